"""Held-out samples on an engine of their own, pinned at the version they are asked for.

Apart from the training engine, because that one changes its weights whenever new ones arrive.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from ..buffer import waits
from ..buffer.errors import Refused
from ..buffer.messages import EvaluationClaim
from ..buffer.records import Message, Score, WeightsManifest
from ..buffer.replay import MAX_DEATHS
from .engine import START_S, Engine, GenerationOutput, GenerationRequest
from .environments.conversation import Episode
from .environments.episode import EpisodeFailed, Player
from .rewards.base import failed
from .rewards.pool import RewardPool
from .samples import completion_of, evaluation_requests


class Results(Protocol):
    """Where results go: the buffer's client, in a run."""

    async def finish_evaluation(
        self, *, job_id: str, uid: int, index: int, text: str, score: Score, num_tokens: int
    ) -> object: ...


class Evaluator:
    """Takes evaluation claims, one version at a time.

    Args:
        make_engine: builds the engine; called in a thread, once, when the first claim arrives.
        render: a conversation to prompt token ids.
        rewards: scores the completions.
        client: gets the results.
        seed: of the run.
        name: of the worker, for those who wait.
        player: plays the samples as episodes, when there is an environment.
        local: brings a manifest's files here, when they are not seen from here.
        deadline_s: of a sample being written; see `Wait.deadline_s`.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        render: Callable[[Sequence[Message]], list[int]],
        rewards: RewardPool,
        client: Results,
        seed: int,
        name: str,
        player: Player | None = None,
        local: Callable[[WeightsManifest], Awaitable[WeightsManifest]] | None = None,
        deadline_s: float = 0.0,
    ) -> None:
        self._local, self._deadline_s = local, deadline_s
        self._make_engine, self._render = make_engine, render
        self._rewards, self._client, self._seed = rewards, client, seed
        self._player, self._name = player, name
        self._claims: asyncio.Queue[EvaluationClaim] = asyncio.Queue()
        self._engine: Engine | None = None
        self._generated = 0

    def put(self, claims: Sequence[EvaluationClaim]) -> None:
        """Queue claims."""
        for claim in claims:
            self._claims.put_nowait(claim)

    async def run(self) -> None:
        """Work on claims until cancelled.

        Raises:
            CorruptData: the pinned weights cannot be read.
        """
        held: EvaluationClaim | None = None
        try:
            while True:
                claims = [held or await self._claims.get()]
                held = None
                while held is None and not self._claims.empty():
                    claim = self._claims.get_nowait()
                    if claim.manifest.version == claims[0].manifest.version:
                        claims.append(claim)
                    else:
                        held = claim  # another version's turn comes when these are done
                await self.evaluate(claims)
        finally:
            await self.close()

    def beat(self) -> None:
        """Let who waits for the engine know whether it wrote anything since the last time."""
        if self._engine is None:
            return
        written = self._engine.stats().generated_tokens
        if written > self._generated:
            waits.progressed(self._engine_words)
        self._generated = written

    @property
    def _engine_words(self) -> str:
        return f"the evaluation engine of {self._name}"

    async def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            await self._engine.close()

    async def evaluate(self, claims: Sequence[EvaluationClaim], deaths: int = 0) -> None:
        """Generate, score and hand in the samples of claims that share a version; `deaths` of the
        engine cut them off before."""
        manifest = claims[0].manifest
        what = f"its evaluation engine to start and load {manifest.version}"
        with waits.waiting(self._name, what, START_S):
            if self._engine is None:
                self._engine = await asyncio.to_thread(self._make_engine)
            await self._engine.load(await self._local(manifest) if self._local else manifest)
        samples = {
            name: (claim, index, request)
            for claim in claims
            for name, (index, request) in evaluation_requests(
                claim, self._render(claim.prompt.messages), self._seed
            ).items()
        }
        for claim, index, _ in samples.values():
            self._wait(claim, index, self._engine_words, deadline_s=self._deadline_s)
        lost: list[EvaluationClaim] = []
        async with asyncio.TaskGroup() as tasks:
            if self._player is not None:
                for claim, index, request in samples.values():
                    tasks.create_task(self._play(self._player, claim, index, request, lost))
            else:
                requests = [request for _, _, request in samples.values()]
                async for output in self._engine.generate(requests):
                    claim, index, _ = samples[output.request_id]
                    tasks.create_task(self._hand_in(claim, index, output, lost))
        if lost:  # the engine died, and is started again to load
            await self._once_more(lost, deaths + 1)

    async def _once_more(self, lost: Sequence[EvaluationClaim], deaths: int) -> None:
        """Samples that the engine's death cut off: together, then each prompt alone, so that one
        that kills the engine is found; it fails, and the evaluation ends."""
        if deaths >= MAX_DEATHS:
            reason = f"the engine died {deaths} times over it"
            score = Score(value=None, status="infrastructure_failed", reason=reason)
            for claim in lost:
                await self._finish(claim, claim.indices[0], "", 0, score)
        elif deaths == 1:
            await self.evaluate(lost, deaths)
        else:
            by_prompt: dict[tuple[str, int], list[EvaluationClaim]] = {}
            for claim in lost:
                by_prompt.setdefault((claim.job_id, claim.prompt.uid), []).append(claim)
            for same in by_prompt.values():
                await self.evaluate(same, deaths)

    def _wait(
        self, claim: EvaluationClaim, index: int, *what: str, deadline_s: float = 0.0
    ) -> None:
        """Register what a sample waits for; nothing: it has ended."""
        uid, now_s = claim.prompt.uid, time.monotonic()
        owner = f"held-out prompt {uid} sample {index}"
        each = (
            waits.Wait(owner=owner, what=words, since_s=now_s, deadline_s=deadline_s)
            for words in what
        )
        waits.put((claim.job_id, uid, index), *each)

    async def _play(
        self,
        player: Player,
        claim: EvaluationClaim,
        index: int,
        request: GenerationRequest,
        lost: list[EvaluationClaim],
    ) -> None:
        assert self._engine is not None
        try:
            episode = await player.play(self._engine, request, claim.prompt)
        except EpisodeFailed as error:
            await self._finish(claim, index, "", 0, failed(str(error)))
        else:
            await self._hand_in(claim, index, episode.output, lost, episode)

    async def _hand_in(
        self,
        claim: EvaluationClaim,
        index: int,
        output: GenerationOutput,
        lost: list[EvaluationClaim],
        episode: Episode | None = None,
    ) -> None:
        """Score a sample and hand it in; add it to `lost` when the engine's death cut it off."""
        if output.finish_reason == "abort" and not output.error:
            self._wait(claim, index)
            lost.append(msgspec.structs.replace(claim, indices=(index,)))
            return
        if episode is not None and episode.score is not None:
            score = episode.score
        elif output.error:
            score = Score(value=None, status="infrastructure_failed", reason=output.error)
        else:
            completion = episode.completion if episode else completion_of(output)
            self._wait(claim, index, reward := f"reward {self._rewards.describe()}")
            score = await self._rewards.score(completion, claim.prompt)
            waits.progressed(reward)  # the others are behind it in one queue
        await self._finish(claim, index, output.text, len(output.token_ids), score)

    async def _finish(
        self, claim: EvaluationClaim, index: int, text: str, num_tokens: int, score: Score
    ) -> None:
        self._wait(claim, index)
        try:
            await self._client.finish_evaluation(
                job_id=claim.job_id,
                uid=claim.prompt.uid,
                index=index,
                text=text,
                score=score,
                num_tokens=num_tokens,
            )
        except Refused:
            return  # the job is gone: its version was replaced, or somebody else finished it

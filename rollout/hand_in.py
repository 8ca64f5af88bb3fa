"""The last step of a rollout: a finished sample is scored and handed in, or given back."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ..buffer import waits
from ..buffer.client import BufferClient
from ..buffer.errors import PeerLost, Refused, TrainingFailed
from ..buffer.messages import Claim
from ..buffer.records import DropReason
from .engine import GenerationOutput, GenerationRequest
from .environments.conversation import Episode
from .rewards.pool import RewardPool
from .samples import completion_of, trajectory_of

RELEASE_DEADLINE_S = 5.0
"""For giving everything back at the end; what is not by then, the lease's expiry gives back."""
MAX_ERRORS_IN_A_ROW = 64
"""So many impossible samples without a possible one: it is not the samples."""

MAX_SCORING_ATTEMPTS = 3
"""A sample whose reward process was lost is issued again; after so many attempts it is handed in
without a reward, so that what takes the process down every time cannot go round for ever."""


class HandIn:
    """Knows which leased samples are not handed in yet. Trace:

    lease(claim, "a", 0)            open: a
    finish(claim, ..., output a)    scored, durable in the buffer; open: none
    """

    def __init__(
        self, client: BufferClient, rewards: RewardPool, engine_id: str, deadline_s: float = 0.0
    ) -> None:
        """`deadline_s` is that of a sample being written; see `Wait.deadline_s`."""
        self._client, self._rewards, self._engine_id = client, rewards, engine_id
        self._deadline_s = deadline_s
        self._open: dict[str, tuple[Claim, int]] = {}
        self._errors_in_a_row = 0

    @property
    def num_open(self) -> int:
        """Samples leased and not handed in: being generated or scored."""
        return len(self._open)

    def lease(self, claim: Claim, request_id: str, index: int) -> None:
        """Note a sample that must be handed in or given back."""
        self._open[request_id] = (claim, index)
        what = f"the engine of {self._engine_id}"
        self._wait(claim, index, request_id, what, self._deadline_s)

    def _wait(
        self, claim: Claim, index: int, request_id: str, what: str, deadline_s: float = 0.0
    ) -> None:
        owner, now_s = f"group {claim.ticket.prompt.uid} sample {index}", time.monotonic()
        wait = waits.Wait(owner=owner, what=what, since_s=now_s, deadline_s=deadline_s)
        waits.put(request_id, wait)

    async def finish(
        self,
        claim: Claim,
        index: int,
        request: GenerationRequest,
        output: GenerationOutput,
        claimed_s: float,
        episode: Episode | None = None,
    ) -> None:
        """Score one sample and hand it in, or give it back when there is nothing to score.

        Raises:
            TrainingFailed: rewards, or samples, fail more often than allowed.
        """
        if output.error:
            await self.reject(claim, index, output.request_id, output.error)
        elif output.finish_reason == "abort":
            await self._release(claim, [index], "expired", "the engine stopped", output.death)
        else:
            await self._score(claim, index, request, output, claimed_s, episode)
        self._open.pop(output.request_id, None)
        waits.put(output.request_id)

    async def _score(
        self,
        claim: Claim,
        index: int,
        request: GenerationRequest,
        output: GenerationOutput,
        claimed_s: float,
        episode: Episode | None,
    ) -> None:
        self._errors_in_a_row = 0
        if episode is None or episode.score is None:
            reward = f"reward {self._rewards.describe()}"
            self._wait(claim, index, output.request_id, reward)
            completion = episode.completion if episode else completion_of(output)
            score = await self._rewards.score(completion, claim.ticket.prompt)
            waits.progressed(reward)  # the others are behind it in one queue
        else:
            score = episode.score
            self._rewards.note(score)
        self._rewards.raise_if_failing()
        if score.status == "infrastructure_failed" and claim.attempt + 1 < MAX_SCORING_ATTEMPTS:
            await self._release(claim, [index], "expired", score.reason)
            return
        trajectory = trajectory_of(
            claim,
            index,
            request,
            output,
            score,
            engine_id=self._engine_id,
            claimed_s=claimed_s,
            scored_s=time.time(),
            written=episode and episode.written_scored(score),
        )
        with suppress(Refused):  # the lease expired or the version was orphaned: issued again
            await self._client.finish(trajectory, claim.lease_id)

    async def reject(self, claim: Claim, index: int, request_id: str, error: str) -> None:
        """End the prompt of an impossible sample, with the reason.

        Raises:
            TrainingFailed: there was no possible one for long.
        """
        self._open.pop(request_id, None)
        waits.put(request_id)
        self._errors_in_a_row += 1
        if self._errors_in_a_row >= MAX_ERRORS_IN_A_ROW:
            raise TrainingFailed(
                f"{self._errors_in_a_row} samples in a row cannot be generated: {error}"
            )
        await self._release(claim, [index], "quarantined", error)

    async def cut(self, claim: Claim, samples: Mapping[str, int]) -> None:
        """Give up samples (request id -> index) that their group does not wait for; for good."""
        if samples:
            await self._release(claim, list(samples.values()), "cut", "the others were faster")
        for request_id in samples:
            self._open.pop(request_id, None)
            waits.put(request_id)

    async def lose(self, claim: Claim, samples: Mapping[str, int]) -> None:
        """Give back samples (request id -> index) that the engine does not hold any more."""
        why = f"lost by the engine of {self._engine_id}, which writes others"
        for request_id, index in samples.items():
            self._open.pop(request_id, None)
            waits.put(request_id)
            waits.remark(
                f"group {claim.ticket.prompt.uid} sample {index} was {why}; it is issued again"
            )
        await self._release(claim, list(samples.values()), "expired", why)

    async def give_back(self) -> None:
        """Release what is not handed in, so that others need not wait for the leases' expiry."""
        with suppress(PeerLost, TimeoutError):
            async with asyncio.timeout(RELEASE_DEADLINE_S):
                for claim, index in list(self._open.values()):
                    await self._release(claim, [index], "expired", "the worker ended")

    async def _release(
        self,
        claim: Claim,
        indices: Sequence[int],
        reason: DropReason,
        detail: str,
        death: str = "",
    ) -> None:
        with suppress(Refused):  # the lease is gone already
            await self._client.release(
                uid=claim.ticket.prompt.uid,
                attempt=claim.attempt,
                indices=indices,
                lease_id=claim.lease_id,
                reason=reason,
                detail=detail,
                death=death,
            )

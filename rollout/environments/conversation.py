"""One episode's tokens as they come: what the policy wrote, and what it was told in between.

Shape suffixes: L tokens of the episode, N tokens the policy wrote.
"""

import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import xxhash

from ...buffer.records import Completion, Message, RaggedArray, Score, Turn
from ..engine import GenerationOutput, GenerationRequest
from .chat import ChatFormat

Generate = Callable[[GenerationRequest], Awaitable[GenerationOutput]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The tokens of an episode, for its trajectory."""

    token_ids: np.ndarray
    """[L] int32."""
    policy_mask: np.ndarray
    """[L] bool: False for prompts and observations."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A finished episode."""

    output: GenerationOutput
    written: Written
    completion: Completion
    """The last answer, and in `turns` all that was said."""
    score: Score | None
    """None: to be given by `[reward]`."""

    def written_scored(self, score: Score) -> Written:
        """The tokens, with a score that `[reward]` gave as the reward of the last turn."""
        if self.score is not None or score.value is None:
            return self.written
        *earlier, last = self.written.turns
        last = msgspec.structs.replace(last, reward=score.value)
        return replace(self.written, turns=(*earlier, last))


class EpisodeFull(Exception):
    """No token is left to write; the episode ends here, with finish reason `length`."""


@dataclass(slots=True)
class Conversation:
    """Records an episode token for token. Trace:

    await reply([user "2 + 2?"], "s0")     prompt turn, policy turn
    reward_last(0.0)
    await reply([user "3 + 3?"], "s1")     observation turn, policy turn
    result()                               one output with all N tokens, and where they stand
    """

    generate: Generate
    chat: ChatFormat
    request: GenerationRequest
    """Its sampling and key; the budget of new tokens is that of the whole episode."""
    max_turn_tokens: int
    messages: list[Message] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    outputs: list[GenerationOutput] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    @property
    def tokens_left(self) -> int:
        """Of the budget."""
        spent = sum(len(output.token_ids) for output in self.outputs)
        return self.request.sampling.max_new_tokens - spent

    async def reply(self, messages: Sequence[Message], state: str = "") -> GenerationOutput:
        """Let the policy answer.

        Args:
            messages: said since its last answer; at first the whole prompt.
            state: hash of the state that it answers.
        Raises:
            EpisodeFull: the budget or the model's context has no room for an answer.
        """
        said = self._said(messages)
        budget = min(self.max_turn_tokens or self.tokens_left, self.tokens_left)
        if budget < 1:
            raise EpisodeFull
        output = await self.generate(self._turn_request([*self.token_ids, *said], budget))
        if output.error and self.outputs:
            raise EpisodeFull
        self._append(said, "observation" if self.outputs else "prompt")
        self._append(output.token_ids.tolist(), "policy", state)
        self.outputs.append(output)
        answer = Message(role="assistant", content=output.text)
        self.messages += [*messages, answer]
        return output

    def reward_last(self, reward: float) -> None:
        """Note what the environment gave for the last answer."""
        for place in reversed(range(len(self.turns))):
            if self.turns[place].role == "policy":
                turn = self.turns[place]
                turn = msgspec.structs.replace(turn, reward=turn.reward + reward)
                self.turns[place] = turn
                return

    def result(self) -> tuple[GenerationOutput, Written]:
        """All that the policy wrote as one output, and the tokens around it.

        Raises:
            ValueError: it never answered.
        """
        if not self.outputs:
            raise ValueError("the policy was never asked")
        mask_L = np.zeros(len(self.token_ids), dtype=bool)
        for turn in self.turns:
            mask_L[turn.start : turn.end] = turn.role == "policy"
        written = Written(
            token_ids=np.array(self.token_ids, dtype=np.int32),
            policy_mask=mask_L,
            turns=tuple(self.turns),
        )
        return _joined(self.request.request_id, self.outputs), written

    def _said(self, messages: Sequence[Message]) -> list[int]:
        if not self.outputs:
            return self.chat.first(messages)
        return self.chat.follow(messages, self.token_ids[-1])

    def _turn_request(self, token_ids: list[int], budget: int) -> GenerationRequest:
        """The first turn draws as a sample of one turn would; later ones from keys of their own."""
        number, key = len(self.outputs), self.request.sample_key
        if number:
            key = xxhash.xxh3_64_intdigest(struct.pack("<Qq", key, number))
        return msgspec.structs.replace(
            self.request,
            request_id=f"{self.request.request_id}/{number}",
            prompt_token_ids=tuple(token_ids),
            sampling=msgspec.structs.replace(self.request.sampling, max_new_tokens=budget),
            sample_key=key,
            conversation=self.request.request_id,
        )

    def _append(self, token_ids: list[int], role: str, state: str = "") -> None:
        start = len(self.token_ids)
        self.token_ids += token_ids
        turn = Turn(start=start, end=len(self.token_ids), role=role, state_hash=state)  # pyright: ignore
        self.turns.append(turn)


def _joined(request_id: str, outputs: Sequence[GenerationOutput]) -> GenerationOutput:
    """The outputs of the turns one after the other."""
    last = outputs[-1]
    return GenerationOutput(
        request_id=request_id,
        token_ids=np.concatenate([o.token_ids for o in outputs]),
        behaviour_logprobs=np.concatenate([o.behaviour_logprobs for o in outputs]),
        versions=tuple(span for o in outputs for span in o.versions),
        kv_version_min=tuple(span for o in outputs for span in o.kv_version_min),
        text=last.text,
        finish_reason=last.finish_reason,
        first_token_s=outputs[0].first_token_s,
        finished_s=time.time(),
        removed_mass=np.concatenate([o.removed_mass for o in outputs]),
        kept_ids=_joined_sets([o.kept_ids for o in outputs]),
        error=last.error,
        death=last.death,
    )


def _joined_sets(sets: Sequence[RaggedArray | None]) -> RaggedArray | None:
    given = [each for each in sets if each is not None]
    if not given:
        return None
    ends = np.cumsum([each.offsets[-1] for each in given])
    shifted = [e.offsets[1:] + end - e.offsets[-1] for e, end in zip(given, ends, strict=True)]
    return RaggedArray(
        values=np.concatenate([each.values for each in given]),
        offsets=np.concatenate([[0], *shifted]).astype(np.int64),
    )

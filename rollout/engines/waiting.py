"""Samples that are not in flight yet, by prompt, and turns whose successors may come.

Samples of one prompt go in together, whoever came between them, so that the prompt's keys, computed
once, are needed for as short as possible (BatchLLM, arXiv:2412.03594).
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from ..engine import GenerationRequest
from .kv_cache import PromptKeys
from .slots import Paused

MOST_IDLE_STEPS = 2048
"""Decode steps that an ended turn's keys wait for the next one, as many as a long answer takes; one
that comes later is computed whole."""


class Group:
    """The samples of one prompt. Trace, with two free rows:

    waiting [a, b, c]   admitted []       keys None
    waiting [c]         admitted [a, b]   keys begun, a part of the prompt a step
    waiting [c]         admitted []       keys done; a and b are in flight
    """

    def __init__(self, key: Hashable, token_ids: np.ndarray, paused: Paused | None = None) -> None:
        self.key, self.token_ids, self.paused = key, token_ids, paused
        self.waiting: deque[GenerationRequest] = deque()
        self.admitted: list[GenerationRequest] = []
        self.keys: PromptKeys | None = None
        self.is_shared = False
        """Whether rows read `keys` as they are, instead of holding copies."""

    @property
    def requests(self) -> list[GenerationRequest]:
        """Those not in flight."""
        return [*self.admitted, *self.waiting]


class Waiting:
    """Groups in the order in which their first samples came; paused ones before them."""

    def __init__(self) -> None:
        self.begun: list[Group] = []
        """Those with admitted samples."""
        self.keyed: list[Group] = []
        """Those whose prompts are computed, or being computed."""
        self.num_samples = 0
        self._groups: OrderedDict[Hashable, Group] = OrderedDict()

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def add(self, request: GenerationRequest, *, goes_on: bool) -> None:
        """Let a sample wait: with all of its prompt, or alone where it goes on from a kept turn."""
        key = (request.conversation if goes_on else "", request.prompt_token_ids)
        if (group := self._groups.get(key)) is None:
            group = self._groups[key] = Group(key, np.array(key[1], dtype=np.int64))
        group.waiting.append(request)
        self.num_samples += 1

    def add_paused(self, paused: Paused) -> None:
        """Let a sample that was in flight go on before all others."""
        key = paused.request.request_id
        self._groups[key] = Group(key, paused.token_ids, paused)
        self._groups[key].waiting.append(paused.request)
        self._groups.move_to_end(key, last=False)
        self.num_samples += 1

    def admit(self, group: Group) -> None:
        """Give its next sample a row to come."""
        if not group.admitted:
            self.begun.append(group)
        group.admitted.append(group.waiting.popleft())

    def put_back(self, group: Group) -> None:
        """Take that back, and forget its keys."""
        group.keys = None
        group.waiting.extendleft(reversed(group.admitted))
        group.admitted.clear()
        self.begun = [other for other in self.begun if other is not group]

    def start(self, ready: Sequence[Group]) -> None:
        """Their admitted samples are in flight."""
        for group in ready:
            self.num_samples -= len(group.admitted)
            group.admitted.clear()
        self._tidy(ready)

    def drop(self, request_ids: set[str]) -> None:
        """Forget samples."""
        for group in self:
            group.waiting = deque(r for r in group.waiting if r.request_id not in request_ids)
            group.admitted = [r for r in group.admitted if r.request_id not in request_ids]
        self.num_samples = sum(len(group.requests) for group in self)
        self._tidy(list(self))

    def _tidy(self, groups: Sequence[Group]) -> None:
        """Drop those none of whose samples wait; keys that rows share live on there."""
        self.begun = [group for group in self.begun if group.admitted]
        self.keyed = [group for group in self.keyed if group.keys and group.requests]
        for group in groups:
            if not group.requests:
                del self._groups[group.key]


class KeptTurns:
    """What ended turns left for the next of their conversations, at most so many, oldest first.
    Nobody says that a conversation has ended: it is one whose next turn does not come."""

    def __init__(self, most: int) -> None:
        self._most, self._turns = most, dict[str, PromptKeys]()
        self._since: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, conversation: str) -> bool:
        return conversation in self._turns

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys are kept."""
        return sum(map(len, self._turns.values()))

    def keep(self, conversation: str, turn: PromptKeys, step: int) -> None:
        """Keep a turn that ended in this step, in place of the oldest when there are too many."""
        self._forget(conversation)
        self._turns[conversation], self._since[conversation] = turn, step
        if len(self._turns) > self._most:
            self.forget_oldest()

    def take(self, conversation: str, token_ids: np.ndarray) -> PromptKeys | None:
        """What the conversation left, if a prompt goes on from there; forgotten either way."""
        turn = self._forget(conversation)
        if turn is None or len(turn) >= len(token_ids):
            return None
        return turn if np.array_equal(token_ids[: len(turn)], turn.token_ids) else None

    def forget_oldest(self) -> None:
        """Make room."""
        self._forget(next(iter(self._turns)))

    def forget_idle(self, step: int) -> None:
        """Those whose next turn has not come for `MOST_IDLE_STEPS`."""
        while self._turns and step - next(iter(self._since.values())) > MOST_IDLE_STEPS:
            self.forget_oldest()

    def forget_all(self) -> None:
        """Of other weights."""
        self._turns.clear()
        self._since.clear()

    def _forget(self, conversation: str) -> PromptKeys | None:
        self._since.pop(conversation, None)
        return self._turns.pop(conversation, None)

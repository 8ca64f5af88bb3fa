"""The run's prompt stream: any uid at any time, the same in every process and after every resume.

The stream is endless: epoch = uid // len(items), and within an epoch every item comes once, in an
order drawn from (seed, epoch). Held-out prompts are the same for every seed of an experiment, so
that sibling runs are measured on one set.
"""

from typing import NamedTuple, Protocol

import numpy as np

from ..buffer.records import Message, Prompt
from .config import PromptsConfig

HELD_OUT_UIDS = 1 << 40
"""Held-out prompts are numbered from here; the stream stays below."""


class Item(NamedTuple):
    """One task item before it becomes a prompt."""

    source_id: str
    question: str | tuple[Message, ...]
    """What is asked; a chat when the data holds one."""
    payload: dict
    """Plain data (msgpack can carry it) for the reward."""
    seed: int = 0


class Items(Protocol):
    """A finite, indexed collection of training items, and some kept apart from them."""

    @property
    def task(self) -> str: ...

    def __len__(self) -> int:
        """Training items per epoch."""
        ...

    def __getitem__(self, index: int) -> Item:
        """Training item `index`; its text is never one of the held-out texts."""
        ...

    def held_out(self) -> list[Item]: ...


class PromptSource:
    """Makes prompts by uid.

    Guarantees: `prompt(uid)` depends on (config, seed, uid) alone, whatever was asked before and in
    whichever process; no prompt of the stream, of any epoch or seed, has the text of a held-out
    one (white space apart); each epoch visits each item once.

        source.prompt(0), source.prompt(1), ...    epoch 0, in the order of (seed, 0)
        source.prompt(len(source))                 epoch 1 begins, in another order
        source.held_out()                          uids from 1 << 40, in a fixed order
    """

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        """Open the source and set the held-out prompts apart.

        Raises:
            ConfigError: a file, column or task is missing, or `held_out` leaves nothing.
        """
        self._config = config
        self._seed = seed
        self._items = _open(config, seed)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._items)

    def prompt(self, uid: int) -> Prompt:
        """The prompt at position `uid` of the stream."""
        epoch, position = divmod(uid, len(self._items))
        if not 0 <= uid < HELD_OUT_UIDS:
            raise ValueError(f"uid {uid} is outside the stream's [0, {HELD_OUT_UIDS})")
        return self._to_prompt(self._items[self._index(epoch, position)], uid, epoch)

    def held_out(self) -> tuple[Prompt, ...]:
        """The prompts kept for evaluation, `config.held_out` of them with distinct texts."""
        return tuple(
            self._to_prompt(item, HELD_OUT_UIDS + number, 0)
            for number, item in enumerate(self._items.held_out())
        )

    def _index(self, epoch: int, position: int) -> int:
        """Which item comes at this position; the newest epoch's order is kept."""
        if not self._config.shuffle:
            return position
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng(np.random.SeedSequence([self._seed, epoch]))
            self._order = (epoch, random.permutation(len(self._items)))
        return int(self._order[1][position])

    def _to_prompt(self, item: Item, uid: int, epoch: int) -> Prompt:
        return Prompt(
            uid=uid,
            source_id=item.source_id,
            task=self._items.task,
            messages=worded(self._config, item.question),
            payload=item.payload,
            epoch=epoch,
            seed=item.seed,
        )


def _open(config: PromptsConfig, seed: int) -> Items:
    """The items behind the config; each kind imports what it needs only here."""
    if config.source == "dataset":
        from .rows import DatasetItems

        return DatasetItems(config)
    from .tasks import FunctionItems, ReasoningGymItems

    kind = FunctionItems if config.source == "function" else ReasoningGymItems
    return kind(config, seed)


def worded(config: PromptsConfig, question: str | tuple[Message, ...]) -> tuple[Message, ...]:
    """The chat the policy sees: a chat from the data is only given the system message."""
    if isinstance(question, str):
        content = config.template.replace("{prompt}", question)
        question = (Message(role="user", content=content),)
    if not config.system or question[0].role == "system":
        return question
    return (Message(role="system", content=config.system), *question)


def normalised_text(question: str | tuple[Message, ...]) -> str:
    """What decides whether two items ask the same: the words, white space apart."""
    if isinstance(question, str):
        return " ".join(question.split())
    return "\n".join(f"{message.role}: {' '.join(message.content.split())}" for message in question)

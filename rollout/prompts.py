"""The run's prompt stream: any uid at any time, the same in every process and after every resume.

The stream is endless: epoch = number // len(items), number being the uid, or with several parts the
prompts of the same part before it; within an epoch every item comes once, in an order drawn from
(seed, epoch). Held-out prompts are the same for every seed of an experiment, so
that sibling runs are measured on one set.
"""

from collections.abc import Callable, Set
from typing import NamedTuple, Protocol

import numpy as np

from ..buffer.records import Message, Prompt
from .config import PromptsConfig, SourceConfig
from .mix import Mix

HELD_OUT_UIDS = 1 << 40
"""Held-out prompts are numbered from here; the stream stays below."""
MIN_EVIDENCE = 16.0
"""Samples of a level, faded as in `[rollout.sizing]`, before its pass rate opens the next one."""
LEVEL_STREAM = 1
"""Sets the numbers that choose levels apart from those that order items."""


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
        """Training item `index`; its text is none of the excluded ones."""
        ...

    def held_out(self) -> list[Item]: ...

    def exclude(self, texts: Set[str]) -> None:
        """Keep texts out of the training items, its own held-out ones among them.

        Raises:
            ConfigError: nothing is left.
        """
        ...


PassRate = Callable[[str], tuple[float, float]]
"""Of a level, by the beginning of its prompts' `source_id`: (pass rate, samples of evidence)."""


class PromptSource:
    """Makes prompts by uid, from one source or from several parts with their shares.

    Guarantees: `prompt(uid, level)` depends on (config, seed, uid, level) alone, whatever was asked
    before and in whichever process; no prompt of the stream, of any part, level, epoch or seed, has
    the text of a held-out one (white space apart); each epoch of a part visits each item once.

        source.prompt(0), source.prompt(1), ...    epoch 0, in the order of (seed, 0)
        source.prompt(len(source))                 epoch 1 begins, in another order
        source.held_out()                          uids from 1 << 40, in a fixed order
        source.level(uid, pass_rate)               how hard it should be, by what the run has seen
    """

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        """Open the sources and set the held-out prompts apart.

        Raises:
            ConfigError: a file, column or task is missing, or `held_out` leaves nothing.
        """
        self._config, self._seed = config, seed
        self._parts = _parts(config, seed)
        self._mix = Mix([part.weight for part in self._parts], seed)
        texts = {
            normalised_text(item.question)
            for part in self._parts
            for items in part.levels
            for item in items.held_out()
        }
        for part in self._parts:
            for items in part.levels:
                items.exclude(texts)
        self._order: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Prompts in one epoch, of all parts at their easiest levels."""
        return sum(len(part.levels[0]) for part in self._parts)

    def level(self, uid: int, pass_rate: PassRate) -> int:
        """The level that the prompt at a position should have; 0 is the easiest.

        The hardest level whose predecessors are all passed at `raise_at` or more; for a share
        `review` of the uids, one of those below it.
        """
        place = self._mix.place(uid)
        part = self._parts[place.part]
        top = 0
        while top + 1 < len(part.levels):
            rate, evidence = pass_rate(_level_name(part, top))
            if evidence < MIN_EVIDENCE or rate < self._config.raise_at:
                break
            top += 1
        chance = np.random.default_rng([self._seed, uid, LEVEL_STREAM]).random()
        review = self._config.review
        return top if not top or chance >= review else int(chance / review * top)

    def prompt(self, uid: int, level: int = 0) -> Prompt:
        """The prompt at position `uid` of the stream.

        Args:
            uid: from 0 on.
            level: from `level`, or `level_of` a prompt that was made before.
        """
        if not 0 <= uid < HELD_OUT_UIDS:
            raise ValueError(f"uid {uid} is outside the stream's [0, {HELD_OUT_UIDS})")
        place = self._mix.place(uid)
        part = self._parts[place.part]
        items = part.levels[level]
        epoch, position = divmod(place.number, len(items))
        index = self._index(place.part, len(items), epoch, position)
        return _to_prompt(part, level, items[index], items.task, uid, epoch)

    def level_of(self, uid: int, source_id: str) -> int:
        """Which level a prompt of this source was made for; 0 when it is none of its part's."""
        part = self._parts[self._mix.place(uid).part]
        names = [_level_name(part, level) for level in range(len(part.levels))]
        name = source_id.rpartition("/")[0]
        return names.index(name) if name in names else 0

    def held_out(self) -> tuple[Prompt, ...]:
        """The prompts kept for evaluation, `config.held_out` of them, of all parts and levels."""
        found = [
            (part, level, item, items.task)
            for part in self._parts
            for level, items in enumerate(part.levels)
            for item in items.held_out()
        ]
        return tuple(
            _to_prompt(*each, HELD_OUT_UIDS + number, 0) for number, each in enumerate(found)
        )

    def _index(self, part: int, size: int, epoch: int, position: int) -> int:
        """Which item comes at this position; of each part and size the newest order is kept."""
        if not self._config.shuffle:
            return position
        stored = self._order.get((part, size))
        if stored is None or stored[-1] != epoch:
            key = [self._seed, epoch, part] if part else [self._seed, epoch]
            random = np.random.default_rng(np.random.SeedSequence(key))
            stored = self._order[part, size] = np.append(random.permutation(size), epoch)
        return int(stored[position])


class _Part(NamedTuple):
    name: str
    """Empty when it is the only one."""
    config: SourceConfig
    weight: float
    levels: list[Items]


def _parts(config: PromptsConfig, seed: int) -> list[_Part]:
    """The stream's sources, each with its share of the held-out prompts."""
    if not config.mix:
        return [_Part("", config, 1.0, [_open(config, config.held_out, seed)])]
    total = sum(part.weight for part in config.mix.values())
    parts = []
    for name, part in config.mix.items():
        levels = [
            part.model_copy(update={"task_config": part.task_config | level})
            for level in part.levels or ({},)
        ]
        share = config.held_out * part.weight / (total * len(levels))
        held_out = max(1, round(share)) if config.held_out else 0
        opened = [_open(level, held_out, seed) for level in levels]
        parts.append(_Part(name, part, part.weight, opened))
    return parts


def _level_name(part: _Part, level: int) -> str:
    """How the `source_id` of a level's prompts begins: what its pass rate is kept under."""
    if not part.name:
        return part.levels[level].task
    return f"{part.name}@{level}" if len(part.levels) > 1 else part.name


def _to_prompt(part: _Part, level: int, item: Item, task: str, uid: int, epoch: int) -> Prompt:
    index = item.source_id.removeprefix(f"{task}/")
    return Prompt(
        uid=uid,
        source_id=f"{_level_name(part, level)}/{index}",
        task=task,
        messages=worded(part.config, item.question),
        payload=item.payload,
        epoch=epoch,
        seed=item.seed,
    )


def _open(config: SourceConfig, held_out: int, seed: int) -> Items:
    """The items behind the config; each kind imports what it needs only here."""
    if config.source == "dataset":
        from .rows import DatasetItems

        return DatasetItems(config, held_out)
    from .tasks import FunctionItems, ReasoningGymItems

    kind = FunctionItems if config.source == "function" else ReasoningGymItems
    return kind(config, held_out, seed)


def worded(config: SourceConfig, question: str | tuple[Message, ...]) -> tuple[Message, ...]:
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

"""Training and held-out items from the rows of a data set."""

from collections.abc import Set
from pathlib import Path
from typing import Any

import xxhash

from ..buffer.errors import ConfigError
from ..buffer.records import Message
from .chats import question_of
from .config import SourceConfig
from .plain import plain
from .prompts import Item, normalised_text
from .readers import read_rows
from .rewards.trl import CHAT_KEY
from .suggest import did_you_mean


class DatasetItems:
    """Items of a data set's rows: the held-out ones are the same for every seed.

    Guarantees: every row is either a training item or repeats the text of a held-out one. Rows are
    held out in the order of a hash of their texts: adding rows, or shuffling the file, moves few.
    """

    def __init__(self, config: SourceConfig, held_out: int) -> None:
        """Read the rows and split them.

        Raises:
            ConfigError: a file or column is missing, a row is broken, or `held_out` leaves none.
        """
        self._config = config
        self._rows = read_rows(config.path, config.split)
        self.task = Path(config.path).stem
        self._check_columns()
        questions = self._rows.column(config.prompt_column)
        self._texts = [
            normalised_text(_question(q, f"row {i + 1} of {config.path}"))
            for i, q in enumerate(questions)
        ]
        self._choose_held_out(held_out)
        self._training: list[int] = []

    def __len__(self) -> int:
        """Training rows."""
        return len(self._training)

    def __getitem__(self, index: int) -> Item:
        """Training item `index`, in the order of the file."""
        return self._item(self._training[index])

    def held_out(self) -> list[Item]:
        """Held-out items; no two have the same text."""
        return [self._item(row) for row in self._held_out]

    def _choose_held_out(self, count: int) -> None:
        first_rows: dict[str, int] = {}
        for row, text in enumerate(self._texts):
            first_rows.setdefault(text, row)
        if count >= len(first_rows):
            raise ConfigError(
                f"prompts.held_out = {count} leaves nothing to train on: {self._config.path} has "
                f"{len(first_rows)} distinct prompts. Lower prompts.held_out, for instance to "
                f"{len(first_rows) // 10}"
            )
        ordered = sorted(first_rows, key=lambda text: xxhash.xxh3_128_digest(text.encode()))
        self._held_out = [first_rows[text] for text in ordered[:count]]

    def exclude(self, texts: Set[str]) -> None:
        """See `Items`: the rows that have such a text are used for nothing."""
        self._training = [row for row, text in enumerate(self._texts) if text not in texts]
        if not self._training:
            raise ConfigError(
                f"prompts.held_out leaves nothing to train on: every prompt of {self._config.path} "
                "is a held-out one of it or of another part"
            )

    def _item(self, row_number: int) -> Item:
        row = dict(self._rows[row_number])
        question = _question(row.pop(self._config.prompt_column), f"row {row_number + 1}")
        payload = {name: plain(value) for name, value in row.items()}
        if self._config.answer_column:
            payload["answer"] = payload.get(self._config.answer_column)
        if not isinstance(question, str):
            payload[CHAT_KEY] = True
        return Item(f"{self.task}/{row_number}", question, payload)

    def _check_columns(self) -> None:
        """Refuse an empty data set and columns that it does not have."""
        path, columns = self._config.path, self._rows.columns
        if len(self._rows) == 0:
            raise ConfigError(f"prompts.path = {path!r} has no rows")
        for key in ("prompt_column", "answer_column"):
            name = getattr(self._config, key)
            if name not in columns and (name or key == "prompt_column"):
                remedy = "" if key == "prompt_column" else ' (or "" when there is no gold answer)'
                raise ConfigError(
                    f"prompts.{key} = {name!r} is not a column of {path}"
                    f"{did_you_mean(name, columns)}. It has: {', '.join(columns)}. Set "
                    f"prompts.{key} to one of them{remedy}"
                )


def _question(value: Any, place: str) -> str | tuple[Message, ...]:
    try:
        return question_of(value)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None

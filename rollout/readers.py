"""Rows of a data set, from whatever holds them.

JSONL and JSON are read here, so that a broken line is named by its number; Parquet by pyarrow; a
folder of `save_to_disk` or a hub name by `datasets`, which is imported for these two alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..buffer.errors import ConfigError


class Rows(Protocol):
    """Rows by number and columns by name."""

    @property
    def columns(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def column(self, name: str) -> list[Any]: ...


class ListRows:
    """Rows held as dictionaries; a key that some rows lack is None there."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.columns = list(dict.fromkeys(key for row in rows for key in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self._rows]


class ArrowRows:
    """Rows of an Arrow table, made into Python objects one at a time."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.columns = list(table.column_names)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table.slice(index, 1).to_pylist()[0]

    def column(self, name: str) -> list[Any]:
        return self._table.column(name).to_pylist()


class HubRows:
    """Rows of a `datasets.Dataset`, with whatever shuffling or filtering it was saved with."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.columns = list(dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset[index]

    def column(self, name: str) -> list[Any]:
        return list(self._dataset[name])


def read_rows(path: str, split: str) -> Rows:
    """Open whatever the path names.

    Raises:
        ConfigError: it does not exist, cannot be read, or a line of it is broken.
    """
    if not path:
        raise ConfigError('prompts.path is empty; prompts.source = "dataset" needs a file or name')
    file = Path(path)
    if file.is_dir():
        return _saved_folder(file, split)
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}.get(
        file.suffix
    )
    if reader is None:
        return _hub_dataset(path, split)
    if not file.is_file():
        raise ConfigError(f"prompts.path = {path!r}: there is no file {file.absolute()}")
    return reader(file)


def _read_jsonl(file: Path) -> Rows:
    """One JSON object a line; empty lines are skipped."""
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_json_object(line, f"line {number} of {file}"))
    return ListRows(rows)


def _json_object(text: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is not a JSON object but a {type(row).__name__}")
    return row


def _read_json(file: Path) -> Rows:
    """A list of JSON objects."""
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{file} is not JSON: {error}. One object a line is JSONL: name it .jsonl"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file} must hold a list of JSON objects")
    return ListRows(rows)


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        return ArrowRows(pyarrow.parquet.read_table(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file} cannot be read as Parquet: {error}") from error


def _saved_folder(folder: Path, split: str) -> Rows:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is a folder, but not one that datasets' save_to_disk wrote: {error}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ConfigError(
                f"prompts.split = {split!r} is not in {folder}; it has: "
                + ", ".join(map(str, found))
            )
        found = found[split]
    return HubRows(found)


def _hub_dataset(name: str, split: str) -> Rows:
    import datasets

    try:
        return HubRows(datasets.load_dataset(name, split=split))
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(
            f"prompts.path = {name!r} is neither a .jsonl, .json or .parquet file nor a folder, "
            f"and as a Hugging Face dataset with split {split!r} it cannot be loaded: {first_line}"
        ) from error

"""Plain data: what msgpack and JSON can carry, and so may stand in a prompt's payload."""

from typing import Any

import msgspec


def plain(value: Any) -> Any:
    """A copy made of None, bool, int, float, str, list and dict with str keys.

    Integers over 64 bits, which msgpack cannot carry, and unknown objects become strings.
    """
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=repr)
    if type(value) is int:
        return value if -(1 << 63) <= value < 1 << 64 else str(value)
    if value is None or type(value) in (bool, float, str):
        return value
    if hasattr(value, "tolist"):  # numpy
        return plain(value.tolist())
    try:
        return msgspec.to_builtins(value)  # dates, enums, UUIDs
    except TypeError:
        return str(value)

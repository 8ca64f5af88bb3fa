"""configs: experiment -> running system. `train` is the one name to import from here."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import train as train


def __getattr__(name: str) -> Any:
    """Load `train` when it is asked for: importing it here would slow down every `plan`."""
    if name == "train":
        from .api import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

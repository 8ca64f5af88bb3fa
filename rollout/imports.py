"""Objects that a setting names: `module:attribute` or `file.py:attribute`."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..buffer.errors import ConfigError
from .suggest import did_you_mean


def import_object(name: str, setting: str) -> object:
    """The object of that name; the neighbours of a file can be imported by it.

    Args:
        name: holds a colon.
        setting: who names it, `reward.name`, for the messages.
    Raises:
        ConfigError: there is no such file, module or attribute, or importing it raised.
    """
    where = f"{setting} = {name!r}"
    module_name, _, attribute = name.rpartition(":")
    if module_name.endswith(".py"):
        module = importing(where, lambda: _file_module(Path(module_name), where))
    else:
        module = importing(where, lambda: importlib.import_module(module_name))
    if not hasattr(module, attribute):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(
            f"{where}: {module_name} has no {attribute!r}{did_you_mean(attribute, names)}"
        )
    return getattr(module, attribute)


def importing(where: str, load: Callable[[], Any]) -> Any:
    """Run a user's import; whatever it raises is a mistake in the config or the module."""
    try:
        return load()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where} cannot be imported: {where_raised(error)}") from error


def where_raised(error: BaseException) -> str:
    """The error in one line, with the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    try:
        message = str(error)
    except Exception:  # the user's class: even its message may raise
        message = "(its message cannot be shown)"
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{place}"


def _file_module(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{where}: there is no file {path.absolute()}")
    # A name of its own: a user's math.py or datasets.py must not become `math` or `datasets`.
    name = f"slipstream_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{where}: {path.absolute()} is not a Python file")
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        # Last, so that a file of theirs called datasets.py does not hide the library.
        sys.path.append(folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

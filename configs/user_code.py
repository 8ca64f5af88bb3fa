"""Functions typed into a script or a notebook, as a file that reward processes can import.

Processes of a run cannot import `__main__`: importing a script again would run it again. So the
source of such a function is copied, with the functions, imports and plain constants it refers to.
"""

import ast
import builtins
import functools
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ..buffer.errors import ConfigError

HEADER = (
    '"""Rewards of this run, copied by slipstream.configs.train from where they were typed."""\n'
)


def import_name(target: Callable[..., Any]) -> str | None:
    """How another process can import a function or class: `module:name` or `file.py:name`.

    None when it cannot: it lives in a script that is being run, a notebook or another function.
    """
    module_name, name = target.__module__, target.__qualname__
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if module_name == "__main__" or getattr(module, name, None) is not target:
        return None
    if importable(module_name):
        return f"{module_name}:{name}"
    # A module beside a script: by its file, unless it is part of a package (relative imports).
    return f"{Path(file).resolve()}:{name}" if file and "." not in module_name else None


@functools.cache
def importable(module_name: str) -> bool:
    """Whether a fresh process, which has neither our working directory nor our `sys.path`, finds
    the module that we have under that name."""
    ask = f"from importlib.util import find_spec; print(find_spec({module_name!r}).origin)"
    command = [sys.executable, "-P", "-c", ask]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60, check=False)
    file = getattr(sys.modules.get(module_name), "__file__", None)
    built_in = file is None and done.returncode == 0
    return built_in or done.stdout.strip() == str(file)


class SourceFile:
    """Collects definitions and what they refer to, and writes them in an order that works.

    Trace:
        file = SourceFile()
        file.add(reward)     # its source, `import re`, a helper it calls, LIMIT = 3
        file.text()          # -> the module
    """

    def __init__(self) -> None:
        self._imports: dict[str, None] = {}
        self._definitions: dict[str, str] = {}

    def add(self, target: FunctionType | type) -> None:
        """Add a function or class under its own name.

        Raises:
            ConfigError: its source cannot be found, or it refers to what cannot be copied.
        """
        name = target.__name__
        if name in self._definitions:
            return
        _refuse_closure(target)
        source = _source(target)
        self._definitions[name] = ""  # a function may call itself
        scope = _globals(target)
        for used in _names(source):
            if used in scope and used != name:
                self._add_global(used, scope[used], name)
        self._definitions[name] = self._definitions.pop(name) + source  # after what it needs

    def __bool__(self) -> bool:
        """Whether anything was added."""
        return bool(self._definitions)

    def text(self) -> str:
        """The module's source."""
        return "\n".join(
            [HEADER, *self._imports, *(f"\n{code}" for code in self._definitions.values())]
        )

    def _add_global(self, name: str, value: Any, user: str) -> None:
        """Make `name` mean in the file what it means where the function was typed."""
        if isinstance(value, ModuleType) and importable(value.__name__):
            self._imports[f"import {value.__name__} as {name}"] = None
        elif isinstance(value, re.Pattern):
            self._imports["import re"] = None
            self._definitions[name] = f"{name} = re.compile({value.pattern!r}, {value.flags})\n"
        elif _is_constant(value):
            self._definitions[name] = f"{name} = {value!r}\n"
        elif hasattr(value, "__module__") and hasattr(value, "__qualname__"):
            self._add_definition(name, value, user)
        else:
            raise ConfigError(
                f"the reward {user} uses {name}, a {type(value).__name__} that cannot be written "
                f"to a file; {_REMEDY}"
            )

    def _add_definition(self, name: str, value: Any, user: str) -> None:
        """A function or class: imported where that works, else copied."""
        module, _, attribute = (import_name(value) or "").rpartition(":")
        if module and not module.endswith(".py"):
            self._imports[f"from {module} import {attribute} as {name}"] = None
            return
        if value.__name__ != name or not isinstance(value, FunctionType | type):
            raise ConfigError(f"the reward {user} uses {name}, which cannot be copied; {_REMEDY}")
        self.add(value)


_REMEDY = (
    "put the reward into a file of its own and pass it by name: rewards=['my_rewards.py:reward']"
)


def _refuse_closure(target: FunctionType | type) -> None:
    if target.__name__ == "<lambda>":
        raise ConfigError(f"a lambda has no name to be found by; write it with def, or {_REMEDY}")
    code = getattr(target, "__code__", None)
    if isinstance(code, CodeType) and code.co_freevars:
        raise ConfigError(
            f"the reward {target.__name__} uses variables of the function around it "
            f"({', '.join(code.co_freevars)}); make them arguments with defaults, or {_REMEDY}"
        )


def _source(target: FunctionType | type) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(target))
        ast.parse(source)
    except (OSError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"the source of the reward {target.__name__} cannot be found ({error}), so other "
            f"processes cannot run it; {_REMEDY}"
        ) from None
    return source


def _globals(target: FunctionType | type) -> dict[str, Any]:
    if isinstance(target, type):
        return vars(sys.modules[target.__module__])
    return inspect.unwrap(target).__globals__


def _names(source: str) -> Iterator[str]:
    """Every name a definition reads, builtins left out; decorators and annotations included."""
    names = {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    yield from sorted(name for name in names if not hasattr(builtins, name))


def _is_constant(value: Any) -> bool:
    """Whether `repr` gives the value back."""
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False

"""What an environment is, and how one is found by name.

Two forms, told apart by their methods:

    class Environment: async def reset(self, prompt); async def step(self, action)    ours
    async def agent(prompt, endpoint) -> Score | float      any code that talks to a model over HTTP

One object per episode of the first form; `[environment] arguments` go to its `__init__`.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

import msgspec
import xxhash

from ...buffer.errors import ConfigError
from ...buffer.records import Prompt, Record
from ..config import EnvironmentConfig
from ..imports import import_object, importing
from ..plain import plain
from ..suggest import did_you_mean

ENTRY_POINT_GROUP = "slipstream.environments"


class Step(Record):
    """What an environment answers: to `reset`, and to each action."""

    observation: str = ""
    """Shown to the policy next; after `reset`, beside the prompt's own messages."""
    role: str = "user"
    """Who says it: `user` or `tool`."""
    reward: float | None = None
    """For the action just taken. An episode is scored by the sum of these, or by `[reward]` when
    every one is None."""
    done: bool = False
    state: Any = None
    """Plain data: turns taken in equal states are compared under GiGPO. None: in no comparison."""
    components: dict[str, float] = {}
    """Logged with the score; those of later steps replace earlier ones."""


class Environment(Protocol):
    """One episode. Both methods may also be plain functions, which then run in a thread."""

    async def reset(self, prompt: Prompt) -> Step: ...

    async def step(self, action: str) -> Step:
        """Answer to what the policy wrote."""
        ...


class Endpoint(Protocol):
    """Where an agent finds the policy: an OpenAI-compatible address, good for one episode."""

    base_url: str
    """Such as http://127.0.0.1:5123/v1."""
    api_key: str
    model: str


Agent = Callable[[Prompt, Endpoint], Any]


def load_environment(config: EnvironmentConfig) -> Callable[[], Environment] | Agent:
    """The factory of environments that the config names, or its agent function.

    Raises:
        ConfigError: it cannot be found, imported or constructed, or has neither form.
    """
    target, where = _find(config.name), f"environment.name = {config.name!r}"
    if isinstance(target, type):
        made = _construct(target, config.arguments, where)
        if hasattr(made, "reset") and hasattr(made, "step"):
            return lambda: target(**config.arguments)
        if hasattr(made, "run"):
            return made.run
    elif callable(target) and not config.arguments and is_agent(target):
        return cast(Agent, target)
    raise ConfigError(
        f"{where} is neither a class with reset(prompt) and step(action), nor a function (prompt, "
        "endpoint) without environment.arguments, nor a class with such a function called run"
    )


def is_agent(target: Any) -> bool:
    """Whether it is called as agent(prompt, endpoint)."""
    if isinstance(target, type):
        return False
    return {"prompt", "endpoint"} <= inspect.signature(target).parameters.keys()


def _find(name: str) -> Any:
    if ":" in name:
        return import_object(name, "environment.name")
    found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        raise ConfigError(
            f"environment.name = {name!r} is not a registered environment"
            f"{did_you_mean(name, found)}. Registered: {', '.join(sorted(found))}. Your own is "
            "named `module:Class` or `file.py:Class`"
        )
    return importing(f"environment.name = {name!r}", found[name].load)


def _construct(kind: type, arguments: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: environment.arguments = {dict(arguments)} do not fit: {error}; it takes "
            f"{inspect.signature(kind)}"
        ) from error


def state_hash(state: Any) -> str:
    """16 hex digits of a state; equal for equal plain data, "" for None."""
    if state is None:
        return ""
    data = msgspec.msgpack.encode(plain(state), order="sorted")
    return xxhash.xxh3_64_hexdigest(data)

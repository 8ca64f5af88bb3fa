"""What a reward is, how it is found by name, and what its answer means.

Accepted forms, told apart by the names of their parameters:

    def reward(completion: Completion, prompt: Prompt) -> Score | float       ours; async too
    class Reward: def score(self, completion, prompt) -> Score | float        ours, with arguments
    def reward(completions, prompts=None, **columns) -> list[float]           TRL's; async too

A function or class may declare, as attributes: `batch_size`, how many samples a call of TRL's form
takes, or how many calls of an async form run at once (1); `cacheable = True`: equal samples get
equal scores, so one is enough.

A failure is recorded as a failure with its reason, never as a reward of 0.
"""

import asyncio
import inspect
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter
from typing import Any, Protocol, cast

from ...buffer.errors import ConfigError
from ...buffer.records import Completion, Message, Prompt, Record, Score, ScoreStatus
from ..config import RewardConfig
from ..imports import import_object, importing, where_raised
from ..suggest import did_you_mean
from .trl import trl_call

ENTRY_POINT_GROUP = "slipstream.rewards"
MAX_REASON_CHARS = 2_000
_FORMS = (
    "reward(completion, prompt) -> Score or float; a class with a method "
    "score(completion, prompt); or TRL's reward(prompts, completions, **columns) -> list[float]"
)

Sample = tuple[Completion, Prompt]
MAX_BATCH_SIZE = 1024


class Reward(Protocol):
    """A reward that is a class; its arguments come from `[reward] arguments`."""

    def score(self, completion: Completion, prompt: Prompt) -> Score | float: ...


class Example(Record, frozen=True):
    """A golden case of a reward, or a near miss: `examples()` of a reward returns some of both."""

    completion: Completion
    prompt: Prompt
    correct: bool
    """True: must score 1. False: must score below 1 (but be scored)."""


def example(text: str, *, correct: bool, **payload: Any) -> Example:
    """An example of a completion's text and the prompt's payload."""
    prompt = Prompt(
        uid=0,
        source_id="example/0",
        task=str(payload.get("task", "example")),
        messages=(Message(role="user", content=str(payload.get("question", "?"))),),
        payload=payload,
    )
    return Example(completion=Completion(text=text), prompt=prompt, correct=correct)


def failed(reason: str, status: ScoreStatus = "reward_failed") -> Score:
    """A score that says why there is none."""
    return Score(value=None, status=status, reason=reason[:MAX_REASON_CHARS])


def normalised(result: object) -> Score:
    """A reward's answer as a `Score`: a finite number, or a failure with the reason.

    Accepts a `Score`, bool, int, float, and a numpy or torch scalar.
    """
    if isinstance(result, Score):
        if result.status != "scored":
            return failed(result.reason, result.status)
        checked = normalised(result.value)
        return result if checked.status == "scored" else checked
    if result is None:
        return failed("the reward returned None; it must return a Score or a number")
    if getattr(result, "shape", None) == ():
        result = cast(Any, result).item()
    if not isinstance(result, int | float):
        kind = type(result).__name__
        return failed(f"the reward returned a {kind}; it must return a Score or a number")
    if not math.isfinite(result):
        return failed(f"the reward returned {result}; it must be finite")
    return Score(value=float(result))


class Scorer:
    """A loaded reward: called with a sample, or with many; never raises for what the reward did."""

    def __init__(self, target: object, where: str, timeout_s: float) -> None:
        """Make any accepted form one of lists.

        Raises:
            ConfigError: it has none of the known forms, or declares nonsense.
        """
        self.batch_size = getattr(target, "batch_size", 1)
        self.cacheable = bool(getattr(target, "cacheable", False))
        if type(self.batch_size) is not int or not 1 <= self.batch_size <= MAX_BATCH_SIZE:
            raise ConfigError(
                f"{where}: batch_size = {self.batch_size!r} must be from 1 to {MAX_BATCH_SIZE}"
            )
        self._call, self._timeout_s = _adapted(target, where), timeout_s
        # One event loop for all calls: an async reward may keep connections open between them.
        self._runner = asyncio.Runner()
        weakref.finalize(self, self._runner.close)

    def __call__(self, completion: Completion, prompt: Prompt) -> Score:
        """The score of one sample."""
        return self.many([(completion, prompt)])[0]

    def many(self, samples: Sequence[Sample]) -> list[Score]:
        """The scores of some samples, in their order: the process boundary of a reward."""
        try:
            results = self._call(samples)
            if any(map(inspect.isawaitable, results)):
                results = self._runner.run(self._gathered(results))
            return [
                failed(f"the reward raised {where_raised(result)}")
                if isinstance(result, BaseException)
                else normalised(result)
                for result in results
            ]
        except (Exception, SystemExit) as error:
            return [failed(f"the reward raised {where_raised(error)}")] * len(samples)

    async def _gathered(self, results: Sequence[Any]) -> list[Any]:
        """Await calls side by side; one that is slow is given up shortly before its process
        would be killed, so that its neighbours keep their scores."""

        async def bounded(result: Any) -> object:
            async with asyncio.timeout(0.9 * self._timeout_s):
                return await result

        tasks = [bounded(result) for result in results]
        return list(await asyncio.gather(*tasks, return_exceptions=True))


def load_reward(config: RewardConfig) -> Scorer:
    """Find the reward that the config names.

    Raises:
        ConfigError: it cannot be found, imported or constructed, or has none of the known forms.
    """
    target = find_reward(config.name)
    where = f"reward.name = {config.name!r}"
    if isinstance(target, type):
        target = _construct(target, config)
    elif config.arguments:
        raise ConfigError(
            f"{where} is not a class, so it takes no reward.arguments; remove "
            f"{', '.join(config.arguments)} or make it a class with a method score"
        )
    return Scorer(target, where, config.timeout_s)


def find_reward(name: str) -> object:
    """The object behind an entry point, `module:attribute` or `file.py:attribute`.

    Raises:
        ConfigError: there is none, or importing it raised.
    """
    if ":" in name:
        return import_object(name, "reward.name")
    return importing(f"reward.name = {name!r}", _entry_point(name).load)


def _entry_point(name: str) -> EntryPoint:
    """The entry point of that name."""
    found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        raise ConfigError(
            f"reward.name = {name!r} is not a registered reward{did_you_mean(name, found)}. "
            f"Registered: {', '.join(sorted(found))}. Your own is named `module:function` or "
            "`file.py:function`"
        )
    return found[name]


def _construct(kind: type, config: RewardConfig) -> object:
    """An instance with the config's arguments."""
    try:
        return kind(**config.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward.arguments = {config.arguments} do not fit {config.name!r}: {error}; it takes "
            f"{_signature(kind)}"
        ) from error


def _adapted(target: object, where: str) -> Callable[[Sequence[Sample]], Sequence[Any]]:
    """Make any accepted form a function of samples that returns results or awaitables of them."""
    call = getattr(target, "score", None) or target
    if not callable(call):
        raise ConfigError(f"{where} is a {type(target).__name__}. Accepted forms: {_FORMS}")
    try:
        parameters = inspect.signature(call).parameters
    except ValueError as error:
        raise ConfigError(f"{where} has no signature to read. Accepted forms: {_FORMS}") from error
    if "completions" in parameters:
        return trl_call(call, parameters)
    if "completion" in parameters and not _required(parameters) - {"completion", "prompt"}:
        return _by_name(call, parameters)
    raise ConfigError(
        f"{where} takes {_signature(call)}, which is none of the accepted forms: {_FORMS}"
    )


def _required(parameters: Mapping[str, Parameter]) -> set[str]:
    """Names of the parameters without a default."""
    optional = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    return {n for n, p in parameters.items() if p.default is p.empty and p.kind not in optional}


def _by_name(
    call: Callable[..., object], parameters: Mapping[str, Parameter]
) -> Callable[[Sequence[Sample]], Sequence[Any]]:
    """Our form, whichever order its parameters have and whether or not it wants the prompt."""

    def one(completion: Completion, prompt: Prompt) -> object:
        given = {"prompt": prompt} if "prompt" in parameters else {}
        try:
            return call(completion=completion, **given)
        except (Exception, SystemExit) as error:
            return error

    return lambda samples: [one(*sample) for sample in samples]


def _signature(call: Callable[..., object]) -> str:
    try:
        return str(inspect.signature(call))
    except ValueError:
        return "unknown arguments"

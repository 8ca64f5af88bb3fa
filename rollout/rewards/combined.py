"""Several rewards as one: their weighted sum, each kept as a component of the score."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from ...buffer.errors import ConfigError
from ...buffer.records import Completion, Prompt, Score
from ..config import RewardConfig
from .base import Scorer, failed, load_reward


class Sum:
    """The weighted sum of several rewards, each logged as a component.

    A sample that one of the rewards fails on fails as a whole: part of a sum is another reward.
    """

    def __init__(
        self,
        rewards: Sequence[str | dict[str, Any]],
        weights: Sequence[float] | None = None,
    ) -> None:
        """Load the parts.

        Args:
            rewards: names as `reward.name` takes them, or tables { name = ..., arguments = {...} }.
            weights: one per reward; all 1 when not given.
        Raises:
            ConfigError: a part cannot be loaded, or weights and rewards differ in number.
        """
        weights = list(weights) if weights is not None else [1.0] * len(rewards)
        if len(weights) != len(rewards) or not rewards:
            raise ConfigError(
                f"reward.arguments: {len(weights)} weights do not fit {len(rewards)} rewards; give "
                "at least one reward, and one weight for each or none"
            )
        tables = [{"name": each} if isinstance(each, str) else each for each in rewards]
        try:
            configs = [RewardConfig.model_validate(table) for table in tables]
        except ValidationError as error:
            raise ConfigError(f"reward.arguments.rewards: {error}") from None
        scorers = [load_reward(config) for config in configs]
        self._parts: list[tuple[str, float, Scorer]] = list(
            zip(_labels([c.name for c in configs]), weights, scorers, strict=True)
        )

    def score(self, completion: Completion, prompt: Prompt) -> Score:
        """The weighted sum; components are the unweighted values."""
        total, components = 0.0, {}
        for label, weight, scorer in self._parts:
            part = scorer(completion, prompt)
            if part.value is None:
                return failed(f"{label}: {part.reason}", part.status)
            total += weight * part.value
            components[label] = part.value
            components |= {f"{label}/{name}": value for name, value in part.components.items()}
        return Score(value=total, components=components)


def _labels(rewards: Sequence[str]) -> list[str]:
    """The functions' names, numbered where two are equal."""
    names = [name.rpartition(":")[2] for name in rewards]
    return [
        name if names.count(name) == 1 else f"{name}_{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]

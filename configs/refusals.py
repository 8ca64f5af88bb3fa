"""What pydantic refused, said so that a person can mend it: key, place, reason, remedy."""

import re
from collections.abc import Mapping
from typing import Any

from ..rollout.suggest import did_you_mean
from . import toml
from .schema import all_keys, all_sections

EXPLAINED = {
    "ratio_law": "both sides of a ratio use one law, set once: rollout.ratio_law",
    "max_new_tokens": "it is set where samples are drawn: rollout.sampling.max_new_tokens",
    "group_size": "the size of a group is rollout.samples_per_prompt",
    "num_generations": "the size of a group is rollout.samples_per_prompt",
    "batch_size": "a step trains learner.prompts_per_step groups of rollout.samples_per_prompt",
    "learning_rate": "it is learner.optimizer.learning_rate (or sft.learning_rate)",
    "lr": "it is learner.optimizer.learning_rate (or sft.learning_rate)",
}
"""Keys people try, and what to write instead."""

WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text in quotes",
    "a valid array": "a list in [ ]",
    "an object": "a section or table of keys",
    "String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'": (
        "letters, digits, '.', '_' and '-', as it names a folder"
    ),
}

KINDS = {bool: "true/false", int: "a whole number", float: "a number", str: "text"}


def explain(detail: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """One pydantic error as a line.

    Args:
        detail: an entry of `ValidationError.errors()`.
        origins: dotted key -> where it was given.
    """
    path = ".".join(str(part) for part in detail["loc"])
    place = _place(path, origins)
    if detail["type"] == "value_error":  # raised by our own checks, which say everything
        return str(detail["ctx"]["error"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {path}{place}{_hint(path)}"
    if detail["type"] == "missing":
        return f"{path}{place} is missing"
    expected = detail["msg"].removeprefix("Input should be ")
    for pydantic_words, words in WORDS.items():
        expected = expected.replace(pydantic_words, words)
    given = detail["input"]
    kind = KINDS.get(type(given), "a table" if isinstance(given, Mapping) else "a list")
    return f"{path}{place} is {toml.value_text(given)} ({kind}); expected {expected}"


def _place(path: str, origins: Mapping[str, str]) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return f" ({origins[path]})" if path else ""


def _hint(path: str) -> str:
    """What was probably meant by an unknown key."""
    sections = all_sections()
    section, _, name = re.sub(r"^(prompts\.mix)\.[^.]+\.", r"\1.NAME.", path).rpartition(".")
    siblings = list(sections[section].model_fields)
    if name in EXPLAINED:
        return f"; {EXPLAINED[name]}"
    if close := did_you_mean(name, siblings):
        return close
    elsewhere = [key.path for key in all_keys() if key.path.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; [{section}] has {', '.join(siblings)}" if section else ""

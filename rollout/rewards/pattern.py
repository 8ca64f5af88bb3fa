"""Reward 1 when what a pattern extracts from the completion equals the gold answer."""

import re

from ...buffer.records import Completion, Prompt, Score
from .base import Example, example
from .exact import gold_answer, same_text


class PatternMatch:
    """Extracts the answer with a regular expression; the last match counts, none scores 0."""

    def __init__(
        self,
        *,
        pattern: str = r"(?im)^\W*(?:final )?answer:\s*(.+?)\s*$",
        group: int | str = 1,
        ignore_case: bool = False,
    ) -> None:
        """Compile the pattern.

        Args:
            pattern: searched in the completion; the default takes a line such as `Answer: 42`.
            group: number or name of the group that holds the answer; 0 is the whole match.
            ignore_case: compare without regard to case.
        Raises:
            ValueError: the pattern does not compile or has no such group.
        """
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        known = {*range(self._pattern.groups + 1), *self._pattern.groupindex}
        if group not in known:
            raise ValueError(f"pattern {pattern!r} has no group {group!r}")
        self._group = group
        self._ignore_case = ignore_case

    def score(self, completion: Completion, prompt: Prompt) -> Score:
        """1.0 for the gold answer, 0.0 for another one or none; the reason says which."""
        found = last_match(self._pattern, completion.text, self._group)
        gold = gold_answer(prompt)
        if found is None:
            return Score(value=0.0, reason="the pattern matches nothing")
        equal = same_text(found, gold, ignore_case=self._ignore_case)
        return Score(value=float(equal), reason="" if equal else f"extracted {found[:80]!r}")

    @staticmethod
    def examples() -> list[Example]:
        """Golden cases and near misses of the default pattern."""
        return [
            example("1 + 1 = 2\nAnswer: 2", correct=True, answer="2"),
            example("Answer: 3\nNo.\n**Final answer: 2  ", correct=True, answer="2"),
            example("Answer: 2\nAnswer: 3", correct=False, answer="2"),
            example("The result is 2", correct=False, answer="2"),
            example("Answer: 2 apples", correct=False, answer="2"),
            example("Answer: -2", correct=False, answer="2"),
        ]


def last_match(pattern: re.Pattern[str], text: str, group: int | str = 1) -> str | None:
    """What the group holds in the last match that is not empty, or None."""
    found = None
    for match in pattern.finditer(text):
        found = match.group(group) if match.group() else found
    return found

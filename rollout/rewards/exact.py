"""Reward 1 for an answer equal to the gold answer, white space apart."""

from ...buffer.records import Completion, Prompt
from .base import Example, example


def gold_answer(prompt: Prompt) -> str:
    """The gold answer of a prompt as text.

    Raises:
        ValueError: the payload has none (recorded as a failure of this sample).
    """
    answer = prompt.payload.get("answer")
    if answer is None:
        columns = ", ".join(sorted(prompt.payload)) or "nothing"
        raise ValueError(f"the prompt's payload has no answer; it has {columns}")
    return str(answer)


def same_text(text: str, answer: str, *, ignore_case: bool = False) -> bool:
    """Whether two texts are equal once runs of white space are one space and the ends are cut."""
    left, right = " ".join(text.split()), " ".join(answer.split())
    return left.casefold() == right.casefold() if ignore_case else left == right


class ExactMatch:
    """The whole completion must be the answer."""

    def __init__(self, *, ignore_case: bool = False) -> None:
        """Set up the comparison, with or without regard to case."""
        self._ignore_case = ignore_case

    def score(self, completion: Completion, prompt: Prompt) -> float:
        """1.0 for the gold answer, else 0.0."""
        gold = gold_answer(prompt)
        return float(same_text(completion.text, gold, ignore_case=self._ignore_case))

    @staticmethod
    def examples() -> list[Example]:
        """Golden cases and near misses."""
        return [
            example("42", correct=True, answer="42"),
            example("  New \n York ", correct=True, answer="New York"),
            example("7", correct=True, answer=7),
            example("new york", correct=False, answer="New York"),
            example("42.", correct=False, answer="42"),
            example("The answer is 42", correct=False, answer="42"),
            example("", correct=False, answer="42"),
        ]

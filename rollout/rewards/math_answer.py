"""Reward 1 when the completion's mathematical answer equals the gold one, by math-verify.

`1/2`, `0.5` and `\\frac{1}{2}` are equal; so are `x^2+1` and `1+x^2`. The library bounds its own
time with signals, which works because a reward runs in the main thread of its own process.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

from ...buffer.records import Completion, Prompt, Score
from .base import Example, example
from .exact import gold_answer

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_DIGITS = r"-?(?:0|[1-9][0-9]{0,14})"
_NUMBER = re.compile(
    rf"(?P<plain>{_DIGITS}(?:\.[0-9]{{1,6}})?)"
    rf"|(?P<sign>-?)\\[dt]?frac\{{(?P<top>{_DIGITS})\}}\{{(?P<bottom>[1-9][0-9]{{0,14}})\}}"
)
_BOX_AT_END = re.compile(rf"\\boxed\{{(?P<inside>{_NUMBER.pattern})\}}\$?\.?\s*\Z")
_LEADS_TO_BOX = re.compile(r"answer(?: is)?:?\s*\Z", re.IGNORECASE)


class MathAnswer:
    """Takes the last boxed expression, else the last one found, and compares it with the gold."""

    cacheable: ClassVar[bool] = True

    def __init__(self, *, float_rounding: int = 6, timeout_s: int = 5) -> None:
        """Import the parser (half a second).

        Args:
            float_rounding: digits after the point that count when numbers are compared.
            timeout_s: whole seconds for parsing and for comparing, each; a comparison cut short
                scores 0. Keep 2 * timeout_s below `reward.timeout_s`.
        """
        import math_verify

        # It logs every expression that it cannot parse; here that is an ordinary wrong answer.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self._library = math_verify
        self._float_rounding = float_rounding
        self._timeout_s = timeout_s
        # A prompt's samples share their gold answer: parsing it once saves a third of the time.
        self._gold = lru_cache(maxsize=4096)(lambda text: self._parse(marked(text)))

    def score(self, completion: Completion, prompt: Prompt) -> Score:
        """1.0 for an equal answer, else 0.0.

        Raises:
            ValueError: the gold answer is not mathematics (recorded as a failure of this sample).
        """
        text = gold_answer(prompt)
        if (equal := self._equal_numbers(text, completion.text)) is not None:
            return Score(value=float(equal))
        gold = self._gold(text)
        if not gold:
            raise ValueError(f"the gold answer {text[:200]!r} cannot be parsed")
        found = self._parse(completion.text)
        equal = self._library.verify(
            gold, found, float_rounding=self._float_rounding, timeout_seconds=self._timeout_s
        )
        return Score(value=float(equal), reason="" if found else "no answer was found")

    def _equal_numbers(self, gold: str, text: str) -> bool | None:
        """What the library would say of two numbers, a hundred times sooner; None: not sure.

        Most answers are a number in a box at the end. Numbers that differ by about the rounding,
        and texts in which the library might find another answer, are left to it.
        """
        given, asked = _boxed_number(text), _number(_answer(gold))
        if given is None or asked is None:
            return None
        if given == asked:
            return True
        return False if abs(given - asked) > 10 * 0.1**self._float_rounding else None

    def _parse(self, text: str) -> list[Any]:
        return self._library.parse(text, parsing_timeout=self._timeout_s)

    @staticmethod
    def examples() -> list[Example]:
        """Golden cases and near misses."""
        return [
            example("So the answer is \\boxed{42}.", correct=True, answer="42"),
            example("It is $\\frac{1}{2}$", correct=True, answer="0.5"),
            example("\\boxed{1+x^2}", correct=True, answer="x^2+1"),
            example("\\boxed{3000}", correct=True, answer="... so\n#### 3,000"),
            example("\\boxed{1} or rather \\boxed{0.51}", correct=False, answer="\\frac{1}{2}"),
            example("\\boxed{(2,1)}", correct=False, answer="(1,2)"),
            example("I do not know", correct=False, answer="42"),
        ]


def marked(answer: str) -> str:
    """A gold answer as the parser wants it, inside a box."""
    answer = _answer(answer)
    return answer if _MARKED.search(answer) else f"\\boxed{{{answer}}}"


def _answer(gold: str) -> str:
    """What follows GSM8K's `####`."""
    return gold.rpartition("####")[2].strip()


def _boxed_number(text: str) -> Fraction | None:
    """The number in the box that ends a text in which nothing else looks like mathematics or like
    another answer."""
    box = _BOX_AT_END.search(text)
    if box is None:
        return None
    before = text[: box.start()].rstrip().removesuffix("$")
    if "$" in before or "\\" in before or "[" in before:
        return None
    lead = _LEADS_TO_BOX.search(before)
    if "answer" in before[: lead.start() if lead else None].lower():
        return None
    return _number(box["inside"])


def _number(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    if found["plain"]:
        return Fraction(found["plain"])
    value = Fraction(int(found["top"]), int(found["bottom"]))
    return -value if found["sign"] else value

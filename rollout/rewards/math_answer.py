"""Reward 1 when the completion's mathematical answer equals the gold one, by math-verify.

`1/2`, `0.5` and `\\frac{1}{2}` are equal; so are `x^2+1` and `1+x^2`. The library bounds its own
time with signals, which works because a reward runs in the main thread of its own process.
"""

import logging
import re
from functools import lru_cache
from typing import Any, ClassVar

from ...buffer.records import Completion, Prompt, Score
from .base import Example, example
from .exact import gold_answer

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")


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
        gold = self._gold(text)
        if not gold:
            raise ValueError(f"the gold answer {text[:200]!r} cannot be parsed")
        found = self._parse(completion.text)
        equal = self._library.verify(
            gold, found, float_rounding=self._float_rounding, timeout_seconds=self._timeout_s
        )
        return Score(value=float(equal), reason="" if found else "no answer was found")

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
    """A gold answer as the parser wants it: what follows GSM8K's `####`, inside a box."""
    answer = answer.rpartition("####")[2].strip()
    return answer if _MARKED.search(answer) else f"\\boxed{{{answer}}}"

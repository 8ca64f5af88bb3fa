"""Reward for generated Python: the share of its unit tests that pass, run in the sandbox.

The prompt's `tests` is a list of {"stdin": ..., "stdout": ...} and {"call": "f(2)", "equals": 4},
or a text of asserts. Expected values of the list's forms never enter the sandbox, so a program
cannot read or forge them. Asserts run beside the program, which could pass by tampering with them:
only an end that was reached counts, but prefer the list.
"""

import ast
import re
import secrets
from typing import Any

from ...buffer.records import Completion, Prompt, Score
from .base import Example, example
from .sandbox import Ran, run_python

_FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)


class CodeTests:
    """Takes the last fenced block, else the whole completion, as the program."""

    def __init__(
        self, *, timeout_s: float = 5.0, memory_mb: int = 512, all_or_nothing: bool = True
    ) -> None:
        """Set the limits of each run.

        Args:
            timeout_s: of one test; keep the number of tests times this below `reward.timeout_s`.
            memory_mb: address space of the program.
            all_or_nothing: 1 only when every test passes; else the share that does.
        """
        self._limits = {"timeout_s": timeout_s, "memory_mb": memory_mb}
        self._all = all_or_nothing

    def score(self, completion: Completion, prompt: Prompt) -> Score:
        """The share of tests passed, or 1 or 0."""
        tests = prompt.payload.get("tests")
        if not tests:
            raise ValueError("the prompt's payload has no tests")
        fenced = _FENCED.findall(completion.text)
        code = fenced[-1] if fenced else completion.text
        cases = [tests] if isinstance(tests, str) else tests
        passed, reason = 0, ""
        for case in cases:
            wrong = self._wrong(code, case)
            passed += not wrong
            reason = reason or wrong
            if wrong and self._all:
                break
        share = passed / len(cases)
        return Score(
            value=float(share == 1.0) if self._all else share,
            components={"tests_passed": share},
            reason=reason[-500:],
        )

    def _wrong(self, code: str, case: Any) -> str:
        """Why a test fails; "" when it passes."""
        mark = secrets.token_hex(16)
        if isinstance(case, str):
            ran = self._run(f"{code}\n{case}\nprint({mark!r})")
            return "" if ran.ok and ran.stdout.endswith(f"{mark}\n") else ran.error or "no end"
        if "call" in case:
            ran = self._run(f"{code}\nprint({mark!r} + repr({case['call']}))")
            try:
                got = ast.literal_eval(ran.stdout.rpartition(mark)[2].strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return ran.error or f"{case['call']} returned no plain value"
            equal = got == case["equals"] and type(got) is type(case["equals"])
            return "" if equal else f"{case['call']} returned {got!r}"
        ran = self._run(code, str(case["stdin"]))
        equal = ran.stdout.split() == str(case["stdout"]).split()
        return "" if ran.ok and equal else ran.error or f"it printed {ran.stdout[:200]!r}"

    def _run(self, code: str, stdin: str = "") -> Ran:
        return run_python(code, stdin, **self._limits)

    @staticmethod
    def examples() -> list[Example]:
        """Golden cases and near misses, cheats among them."""
        twice = [{"call": "f(2)", "equals": 4}, {"call": "f(-1)", "equals": -2}]
        echo = [{"stdin": "a b", "stdout": "b a"}]
        good = "def f(x):\n    return 2 * x"
        return [
            example(f"Sure:\n```python\n{good}\n```", correct=True, tests=twice),
            example("print(*reversed(input().split()))", correct=True, tests=echo),
            example(good, correct=True, tests="assert f(3) == 6"),
            example("def f(x):\n    return x + 2", correct=False, tests=twice),
            example("def f(x):\n    return 4.0", correct=False, tests=twice),
            example("import os; os._exit(0)", correct=False, tests="assert f(3) == 6"),
            example("raise SystemExit(0)", correct=False, tests=twice),
            example("", correct=False, tests=echo),
        ]

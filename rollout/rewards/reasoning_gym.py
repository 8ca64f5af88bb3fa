"""The score that a reasoning-gym task itself gives to an answer.

The prompt's payload holds the task's entry (question, answer, metadata) and its settings, as
`rollout/tasks.py` puts them there.
"""

import json
import re
from typing import Any

from ...buffer.records import Completion, Prompt, Score
from ..tasks import make_task
from .base import Example, example
from .pattern import last_match

ANSWER_TAG = r"(?s)<answer>\s*(.*?)\s*</answer>"


class ReasoningGym:
    """Extracts the answer and asks the task to score it, between 0 and 1."""

    def __init__(self, *, extract: str = "", exact: bool = False) -> None:
        r"""Set up the extraction.

        Args:
            extract: a regular expression whose first group, in its last match, is the answer; a
                completion without a match scores 0. By default the answer stands between
                `<answer>` and `</answer>`, or is the whole text when there are no such tags.
            exact: 1 only for an answer that the task scores 1, else 0. Most tasks give part of the
                score to answers that merely contain the right one, which a policy will find out.
        Raises:
            ValueError: `extract` does not compile or has no group.
        """
        try:
            self._extract = re.compile(extract or ANSWER_TAG)
        except re.error as error:
            raise ValueError(f"extract {extract!r} is not a regular expression: {error}") from error
        if not self._extract.groups:
            raise ValueError(f"extract {extract!r} needs a group (...) around the answer")
        self._whole_text = not extract
        self._exact = exact
        self._tasks: dict[str, Any] = {}

    def score(self, completion: Completion, prompt: Prompt) -> Score:
        """The task's score of the extracted answer."""
        answer = last_match(self._extract, completion.text)
        if answer is None and self._whole_text:
            answer = completion.text.strip()
        if answer is None:
            return Score(value=0.0, reason="no answer was found")
        entry = entry_of(prompt)
        value = float(self._task(prompt).score_answer(answer, entry))
        if self._exact:
            return Score(value=float(value >= 1.0), components={"task_score": value})
        return Score(value=value)

    def _task(self, prompt: Prompt) -> Any:
        """The task's object, made once per task and settings."""
        settings = prompt.payload.get("task_config", {})
        key = f"{prompt.task} {json.dumps(settings, sort_keys=True)}"
        if key not in self._tasks:
            self._tasks[key] = make_task(prompt.task, settings)
        return self._tasks[key]

    @staticmethod
    def examples() -> list[Example]:
        """Golden cases and near misses on `chain_sum`."""
        entry = {"task": "chain_sum", "question": "4 + 3 =", "answer": "7", "metadata": {}}
        return [
            example("4 + 3 = 7\n<answer>7</answer>", correct=True, **entry),
            example("<answer>8</answer> no, <answer> 7.0 </answer>", correct=True, **entry),
            example(" 7\n", correct=True, **entry),
            example("<answer>8</answer>", correct=False, **entry),
            example("<answer>7 or 8</answer>", correct=False, **entry),
            example("4 + 3 = 7", correct=False, **entry),
            example("", correct=False, **entry),
        ]


def entry_of(prompt: Prompt) -> dict[str, Any]:
    """The task's own entry, rebuilt from the payload.

    ARC boards are compared as nested tuples, which msgpack turned into lists.

    Raises:
        ValueError: the prompt does not come from a reasoning-gym task.
    """
    missing = {"question", "answer", "metadata"} - prompt.payload.keys()
    if missing:
        raise ValueError(
            f"the prompt's payload has no {', no '.join(sorted(missing))}: this reward needs "
            'prompts.source = "reasoning_gym"'
        )
    entry = {name: prompt.payload[name] for name in ("question", "answer", "metadata")}
    if prompt.task in ("arc_agi", "rearc"):
        board = tuple(map(tuple, entry["metadata"]["output"]))
        entry["metadata"] = {**entry["metadata"], "output": board}
    return entry

"""The contract of a reward, checked: what `slipstream reward test` runs, and a plug-in's own test.

    for finding in check(RewardConfig(name="my_reward.py:score")):
        assert finding.ok, finding.detail

The reward runs as in a training run, in processes of its own that are killed when they hang.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from ...buffer.records import Completion, Score
from ..config import RewardConfig
from .base import Example, Sample, find_reward
from .pool import RewardPool

LONG_CHARS = 1_000_000
"""Beyond what any sampling law lets through, and what a quadratic pattern takes hours for."""
REPEATS = 2_000


class Finding(NamedTuple):
    """One line of the contract."""

    check: str
    ok: bool
    detail: str = ""
    """Why not; or what was found."""


class _Scored(NamedTuple):
    scores: list[Score]
    slowest_s: float


def check(config: RewardConfig) -> list[Finding]:
    """Check a reward against its contract.

    Returns:
        A finding per line: it loads in a fresh process, has golden cases and near misses that score
        as stated, scores within its time-out, always the same, whatever was scored before, and is
        sane on odd text.
    Raises:
        ConfigError: it cannot be found, imported or constructed, or has none of the known forms.
    """
    return asyncio.run(_check(config))


async def _check(config: RewardConfig) -> list[Finding]:
    await _scored(config, [])  # a reward that cannot be loaded takes its own process down first
    findings = [Finding("loads in a process of its own", True)]
    examples, problem = _examples(config)
    findings.append(Finding("has golden cases and near misses", not problem, problem))
    if not examples:
        return findings
    samples: list[Sample] = [(each.completion, each.prompt) for each in examples]
    first = await _scored(config, samples)
    again = await _scored(config, samples)
    reversed_ = await _scored(config, samples[::-1])
    findings += [
        _as_stated(examples, first.scores),
        Finding(
            "scores within its time-out",
            not any("took longer" in score.reason for score in first.scores),
            f"{1000 * first.slowest_s:.1f} ms at most; reward.timeout_s = {config.timeout_s:g}",
        ),
        _equal("scores the same in another process", samples, first.scores, again.scores),
        _equal(
            "scores the same in another order: calls share no state",
            samples, first.scores, reversed_.scores[::-1],
        ),
    ]  # fmt: skip
    return findings + await _on_odd_text(config, examples)


def _examples(config: RewardConfig) -> tuple[list[Example], str]:
    """The reward's own examples, and what is wrong with them."""
    target = find_reward(config.name)
    of_module = getattr(target, "__globals__", {}).get("examples")
    function: Callable[[], Sequence[Example]] | None = getattr(target, "examples", of_module)
    remedy = (
        "write a function examples() beside it (or a static method of the class) that returns "
        "`example(text, correct=True or False, answer=...)` of slipstream.rollout.rewards.base"
    )
    if function is None:
        return [], f"it has none; {remedy}"
    try:
        found = [msgspec.convert(each, Example) for each in function()]
    except Exception as error:  # the user's function
        return [], f"examples() failed: {type(error).__name__}: {error}; {remedy}"
    if {each.correct for each in found} != {True, False}:
        return found, f"examples() must hold both correct=True and correct=False; {remedy}"
    return found, ""


async def _scored(config: RewardConfig, samples: Sequence[Sample]) -> _Scored:
    """Score one after another in one fresh process."""
    scores, slowest_s = [], 0.0
    async with RewardPool(config, num_processes=1) as pool:
        for completion, prompt in samples:
            began_s = time.perf_counter()
            scores.append(await pool.score(completion, prompt))
            slowest_s = max(slowest_s, time.perf_counter() - began_s)
    return _Scored(scores, slowest_s)


def _as_stated(examples: Sequence[Example], scores: Sequence[Score]) -> Finding:
    wrong = [
        f"{_short(each.completion.text)} is {'correct' if each.correct else 'a near miss'} "
        f"and got {_said(score)}"
        for each, score in zip(examples, scores, strict=True)
        if score.value is None or (score.value == 1.0) != each.correct
    ]
    return Finding("golden cases score 1, near misses below", not wrong, "; ".join(wrong))


def _equal(
    name: str, samples: Sequence[Sample], ones: Sequence[Score], others: Sequence[Score]
) -> Finding:
    differ = [
        f"{_short(completion.text)}: {_said(one)}, then {_said(other)}"
        for (completion, _), one, other in zip(samples, ones, others, strict=True)
        if (one.status, one.value, one.components) != (other.status, other.value, other.components)
    ]
    return Finding(name, not differ, "; ".join(differ))


async def _on_odd_text(config: RewardConfig, examples: Sequence[Example]) -> list[Finding]:
    """Odd completions of the first golden prompt: always a score; for none of them a full one
    where nothing was answered."""
    golden = next((each for each in examples if each.correct), examples[0])
    prompt, text = golden.prompt, golden.completion.text
    asked = "\n".join(message.content for message in prompt.messages)
    odd = {
        "an empty answer": ("", False),
        "blank lines": (" \n\t\n ", False),
        "the prompt echoed": (asked, False),
        "a word repeated": ("the " * REPEATS, False),
        "a golden answer repeated": (f"{text}\n" * REPEATS, True),
        "a very long answer": ("x1 " * (LONG_CHARS // 3), False),
        "bytes that are no UTF-8": (b"\xff\xfe\x00\x80 ".decode("utf-8", "replace"), False),
    }
    samples: list[Sample] = [
        (Completion(text=written, finish_reason="length"), prompt) for written, _ in odd.values()
    ]
    scored = await _scored(config, samples)
    return [
        Finding(
            f"is sane on {what}",
            score.status == "scored" and (may_be_right or score.value != 1.0),
            "" if score.status == "scored" and score.value != 1.0 else f"it got {_said(score)}",
        )
        for (what, (_, may_be_right)), score in zip(odd.items(), scored.scores, strict=True)
    ]


def _said(score: Score) -> str:
    if score.value is not None:
        return f"{score.value:g}"
    return f"no score: {score.reason.splitlines()[0] if score.reason else score.status}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")

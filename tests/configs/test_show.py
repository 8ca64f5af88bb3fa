"""Reading rollouts back: who wrote which token, what carried no gradient, and why."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from slipstream.buffer import events
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.events import Decision, Facts
from slipstream.buffer.journal import Journal
from slipstream.buffer.messages import ProofLine
from slipstream.buffer.records import (
    DropReason,
    Message,
    Prompt,
    SamplingParams,
    Score,
    SizingDecision,
    Ticket,
    Timings,
    Trajectory,
    Version,
    VersionSpan,
)
from slipstream.configs.load import load_table
from slipstream.configs.rollouts import read_rollouts
from slipstream.configs.run_dir import create_run_dir, update_run
from slipstream.configs.show import as_text, load_tokenizer, pieces, show
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """One token per byte."""
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    (tmp_path / "model").mkdir()
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    return made


class Story:
    """Writes a ledger as the service would."""

    def __init__(self, run_dir: Path, tokenizer: Tokenizer) -> None:
        self.journal, self.tokenizer = Journal(run_dir), tokenizer

    def put(self, uid: int) -> None:
        ticket = Ticket(
            prompt=Prompt(
                uid=uid, source_id=f"toy/{uid}", task="toy",
                messages=(Message(role="user", content=f"question {uid}"),),
            ),
            sizing=SizingDecision(sizer="fixed", num_samples=2, max_new_tokens=99, reason=""),
        )  # fmt: skip
        self.commit(events.Put(uid=uid, num_samples=2, ticket=self.journal.append(ticket)))

    def finish(self, uid: int, index: int, text: str, reward: float | None, *steps: int) -> None:
        """One sample, its text written in equal parts by the versions of these steps."""
        written = self.tokenizer.encode(text).ids
        asked = self.tokenizer.encode("Q ").ids
        cuts = [round(len(written) * i / len(steps)) for i in range(len(steps) + 1)]
        spans = tuple(
            VersionSpan(version=Version(branch=0, step=step), length=end - start)
            for step, start, end in zip(steps, cuts[:-1], cuts[1:], strict=True)
        )
        trajectory = Trajectory(
            uid=uid, attempt=0, index=index,
            token_ids=np.array([*asked, *written], dtype=np.int32),
            policy_mask=np.array([False] * len(asked) + [True] * len(written)),
            behaviour_logprobs=np.zeros(len(written), dtype=np.float32),
            versions=spans, kv_version_min=spans, sampling=SamplingParams(), finish_reason="stop",
            text=text, score=self.score(reward), turns=(),
            timings=Timings(claimed_s=0, first_token_s=0, generated_s=0, scored_s=0),
            engine_id="worker-0",
        )  # fmt: skip
        facts = Facts(
            spans=tuple((span.version.branch, span.version.step, span.length) for span in spans),
            reward=reward,
        )
        payload = self.journal.append(trajectory)
        self.commit(events.Finished(uid=uid, index=index, payload=payload, facts=facts))

    @staticmethod
    def score(reward: float | None) -> Score:
        if reward is None:
            return Score(value=None, status="reward_failed", reason="the reward raised KeyError")
        return Score(value=reward, components={"accuracy": reward})

    def take(self, step: int, uid: int, *decisions: Decision) -> None:
        self.commit(events.Taken(uid=uid, step=step, decisions=decisions))
        proof = ProofLine(
            step=step, bound=1, max_lag=0, violations=0, orphaned_tokens=0, lag_counts={},
            trained_tokens=0, trimmed_tokens=0, mixed_trajectories=0, trained_trajectories=0,
            dropped={}, length_bias=1.0,
        )  # fmt: skip
        self.commit(events.StepTaken(step=step, request_id=str(step), proof=proof))

    def drop(self, uid: int, reason: DropReason, step: int) -> None:
        self.commit(events.Dropped(uid=uid, reason=reason, step=step))

    def commit(self, event: Any) -> None:
        self.journal.commit([event])


@pytest.fixture
def run_dir(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Step 1 took prompt 0 and dropped prompt 1; step 2 took prompt 2, one sample trimmed."""
    run_dir = create_run_dir(load_table({"runs_dir": str(tmp_path)}, name="toy"), tmp_path / "run")
    update_run(run_dir, model_dir=str(tmp_path / "model"))
    story = Story(run_dir, tokenizer)
    for uid in range(3):
        story.put(uid)
    story.finish(0, 0, "good", 1.0, 0)
    story.finish(0, 1, "bad", 0.0, 0)
    story.finish(1, 0, "same", 0.5, 0)
    story.finish(1, 1, "same", 0.5, 0)
    story.drop(1, "no_signal", 1)
    story.take(1, 0, Decision(index=0, trained=True), Decision(index=1, trained=True))
    story.finish(2, 0, "oldnew", 1.0, 0, 1)
    story.finish(2, 1, "broken", None, 1)
    story.take(
        2, 2,
        Decision(index=0, trained=True, stale_prefix=3),
        Decision(index=1, trained=False, drop_reason="reward_failed"),
    )  # fmt: skip
    story.journal.close()
    return run_dir


def shown(run_dir: Path, *arguments: Any, **options: Any) -> str:
    out = io.StringIO()
    show(run_dir, *arguments, console=Console(file=out, width=120), **options)
    return out.getvalue()


def test_without_a_step_the_newest_taken_one_is_shown(run_dir: Path) -> None:
    assert {rollout.entry.step for rollout in read_rollouts(run_dir, pick="all")} == {2}


@pytest.mark.parametrize(
    ("step", "pick", "texts"),
    [
        (1, "best", ["good", "same", "same", "bad"]),
        (1, "worst", ["bad", "same", "same", "good"]),
        (1, "all", ["good", "bad", "same", "same"]),
        (2, "stale", ["oldnew"]),
        (2, "failed", ["broken"]),
    ],
)
def test_each_pick_selects_and_orders(
    run_dir: Path, step: int, pick: Any, texts: list[str]
) -> None:
    assert [r.trajectory.text for r in read_rollouts(run_dir, step, pick)] == texts


def test_tokens_are_told_apart_by_version_and_by_whether_they_carry_gradient(
    run_dir: Path, tokenizer: Tokenizer
) -> None:
    [rollout] = read_rollouts(run_dir, 2, "stale")
    found = [(p.text, p.version and p.version.step, p.masked) for p in pieces(rollout, tokenizer)]
    assert found == [("old", 0, True), ("new", 1, False)]


def test_masked_tokens_are_struck_through_in_the_colour_of_their_version(
    run_dir: Path, tokenizer: Tokenizer
) -> None:
    [rollout] = read_rollouts(run_dir, 2, "stale")
    text = as_text(rollout, tokenizer)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["old"] == "green strike"
    assert styles["new"] == "cyan"


def test_reward_components_advantage_and_fate_are_shown(run_dir: Path) -> None:
    text = shown(run_dir, 1, "best")
    assert "step 1  prompt 0 (toy/0)  attempt 0  sample 0  worker-0" in text
    assert "reward 1  accuracy 1  advantage +1.000  trained (4 tokens, stop)" in text
    assert "dropped: no_signal (4 tokens, stop)" in text
    assert "user: question 0" in text
    assert "version 0.0" in text


def test_a_failed_reward_is_shown_with_its_reason(run_dir: Path) -> None:
    text = shown(run_dir, 2, "failed")
    assert "reward_failed: the reward raised KeyError" in text
    assert "in the baseline only: reward_failed" in text


def test_the_same_as_json_lines(run_dir: Path) -> None:
    rows = [json.loads(line) for line in shown(run_dir, 1, "all", jsonl=True).splitlines()]
    assert [(row["text"], row["advantage"], row["drop_reason"]) for row in rows] == [
        ("good", pytest.approx(1.0, abs=1e-5), None),
        ("bad", pytest.approx(-1.0, abs=1e-5), None),
        ("same", None, "no_signal"),
        ("same", None, "no_signal"),
    ]
    assert rows[0]["pieces"] == [{"text": "good", "version": "0.0", "masked": False}]


def test_a_limit_is_kept(run_dir: Path) -> None:
    assert len(read_rollouts(run_dir, 1, "best", limit=2)) == 2


def test_what_a_resume_left_behind_is_not_shown(run_dir: Path, tokenizer: Tokenizer) -> None:
    story = Story(run_dir, tokenizer)
    story.commit(events.BranchOpened(branch=1, parents={1: (0, 1)}, resumed_at=1))
    story.journal.close()
    assert {rollout.entry.step for rollout in read_rollouts(run_dir, pick="all")} == {1}
    with pytest.raises(ConfigError, match="has no step 2; it has taken steps 1 to 1"):
        read_rollouts(run_dir, 2)


def test_a_character_of_several_tokens_is_not_cut(run_dir: Path, tokenizer: Tokenizer) -> None:
    story = Story(run_dir, tokenizer)
    story.put(3)
    story.finish(3, 0, "é", 1.0, 0, 1)  # two bytes, one by each version
    story.take(3, 3, Decision(index=0, trained=True))
    story.journal.close()
    [rollout] = read_rollouts(run_dir, 3)
    assert "".join(piece.text for piece in pieces(rollout, tokenizer)) == "é"


def test_a_run_before_its_first_step_is_refused_in_words(tmp_path: Path) -> None:
    run_dir = create_run_dir(load_table({"runs_dir": str(tmp_path)}, name="toy"), None)
    with pytest.raises(ConfigError, match="has the run taken its first step"):
        read_rollouts(run_dir)
    Journal(run_dir).close()
    with pytest.raises(ConfigError, match="has not taken a batch yet"):
        read_rollouts(run_dir)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)

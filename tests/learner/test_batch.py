"""From groups to micro-batches: who is trained, in which order, on which tokens."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.buffer.errors import CorruptData
from slipstream.buffer.records import SamplingParams, Version, VersionSpan
from slipstream.learner.batch import (
    EFFICIENT_TOKENS,
    RatioLaw,
    Sample,
    collate,
    own_share,
    plan_micro_batches,
    same_weights,
    samples_of,
    updates_of,
)
from slipstream.learner.config import ObjectiveConfig
from slipstream.learner.policy import hidden_states, score
from slipstream.learner.rows import Piece, lay_out

HELD = Version(branch=0, step=0)
LONG_TAIL = Path(__file__).parents[1] / "bench" / "traces" / "long_tail.json"


def test_samples_come_in_order_of_uid_and_index(make):
    groups = make.groups(3, 4)
    shuffled = [groups[2], groups[0], groups[1]]
    got = [(s.trajectory.uid, s.trajectory.index) for s in samples_of(shuffled, ObjectiveConfig())]
    assert got == [(u, i) for u in range(3) for i in range(4)]


def test_untrained_rewards_count_in_the_baseline_and_failed_ones_do_not(make):
    rng = np.random.default_rng(0)
    rewards = [1.0, 0.0, 0.5, None]
    trajectories = [make.trajectory(0, i, rng, reward=r) for i, r in enumerate(rewards)]
    group = make.group(0, trajectories, s1={"trained": False}, s3={"trained": False})
    samples = samples_of([group], ObjectiveConfig(advantage="group_mean"))
    assert [(s.trajectory.index, s.advantage) for s in samples] == [(0, 0.5), (2, 0.0)]


def test_a_stale_prefix_is_context_without_weight(make):
    trajectory = make.trajectory(1, 0, np.random.default_rng(0), num_prompt=3, num_written=5)
    other = make.trajectory(1, 1, np.random.default_rng(1), num_prompt=3, num_written=4)
    group = make.group(1, [trajectory, other], s0={"stale_prefix": 2}, s1={"stale_prefix": 4})
    (sample,) = samples_of([group], ObjectiveConfig(advantage="group_mean"))
    batch = collate([[sample]], HELD, torch.float64)
    assert batch.layout.input_ids_BL.shape == (1, 7)
    assert batch.layout.positions_T.tolist() == [4, 5, 6]
    assert batch.layout.targets_T.tolist() == trajectory.token_ids[5:].tolist()
    np.testing.assert_array_equal(batch.behaviour_T, trajectory.behaviour_logprobs[2:])


def test_dropped_siblings_stay_in_the_baseline_where_long_answers_are_the_right_ones(make):
    """Planted: right answers are long, so that they get old in flight and are dropped.

    A short answer is worth 0 less than the policy's mean q: its advantage has to average -q over
    groups. Compared with the short ones alone, all of which are wrong, it would be 0, and the
    policy would never hear that it should write longer. Power: the standard error of the mean is
    below q / 20, so that a baseline without the dropped ones is 20 of them away.
    """
    rng, q, trained = np.random.default_rng(0), 0.3, []
    for uid in range(400):
        right = rng.random(8) < q
        samples = [
            make.trajectory(uid, i, rng, num_prompt=2, num_written=12 if r else 2, reward=float(r))
            for i, r in enumerate(right)
        ]
        dropped = {
            f"s{i}": {"trained": False, "drop_reason": "stale"} for i in np.flatnonzero(right)
        }
        trained += samples_of(
            [make.group(uid, samples, **dropped)], ObjectiveConfig(advantage="leave_one_out")
        )
    assert {sample.trajectory.score.value for sample in trained} == {0.0}
    advantages = np.array([sample.advantage for sample in trained])
    error = advantages.std() / np.sqrt(len(advantages) / 8)  # of groups: siblings share a baseline
    assert error < q / 20
    assert abs(advantages.mean() + q) < 4 * error
    assert advantages.mean() < -16 * error


def test_observations_between_turns_are_never_trained(make):
    rng = np.random.default_rng(0)
    mask = np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=bool)
    span = (VersionSpan(version=HELD, length=3),)
    trajectory = make.trajectory(0, 0, rng, num_prompt=2, num_written=6)
    fields = {"policy_mask": mask, "behaviour_logprobs": np.zeros(3)}
    spans = {"versions": span, "kv_version_min": span}
    turned = make.trajectory(0, 0, rng, num_prompt=2, num_written=6, **fields, **spans)
    sample = Sample(trajectory=turned, advantage=1.0, first_trained=0)
    batch = collate([[sample]], HELD, torch.float64)
    assert batch.layout.positions_T.tolist() == [1, 2, 5]
    assert batch.layout.targets_T.tolist() == turned.token_ids[[2, 3, 6]].tolist()
    assert len(trajectory.token_ids) == 8


@given(
    answers=st.lists(
        st.lists(st.integers(1, 150), min_size=1, max_size=8), min_size=1, max_size=12
    ),
    num_prompt=st.integers(1, 90),
    budget=st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_micro_batches_hold_every_sample_once_within_the_budget(
    make_plain, answers, num_prompt, budget
):
    samples = [make_plain(u, num_prompt, n) for u, group in enumerate(answers) for n in group]
    plan = plan_micro_batches(samples, budget)
    flat = [id(s) for rows in plan for row in rows for s in row]
    assert sorted(flat) == sorted(map(id, samples))
    for rows in plan:
        for row in rows:
            assert len({s.trajectory.uid for s in row}) == 1
        widths = [width_of(row, num_prompt) for row in rows]
        padded = len(rows) * max(widths)
        assert len(rows) == 1 or padded <= budget
        if sum(widths) > EFFICIENT_TOKENS + 600:
            assert padded <= 1.5 * sum(widths)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_long_tail_is_padded_by_less_than_a_twentieth_and_dealt_evenly(make_plain, num_ranks):
    groups = json.loads(LONG_TAIL.read_text())["groups"]
    samples = [make_plain(u, g["prompt"], n) for u, g in enumerate(groups) for n in g["written"]]
    plan = plan_micro_batches(samples, 16_384, num_ranks=num_ranks)
    shares = [own_share(plan, rank, num_ranks) for rank in range(num_ranks)]
    widths = [
        [[width_of(row, groups[row[0].trajectory.uid]["prompt"]) for row in rows] for rows in share]
        for share in shares
    ]
    assert len({len(share) for share in shares}) == 1
    loads = [sum(len(rows) * max(rows) for rows in share) for share in widths]
    inputs = sum(sum(rows) for share in widths for rows in share)
    assert sum(loads) * 0.95 < inputs
    assert max(loads) < 1.25 * sum(loads) / num_ranks


def width_of(row: list[Sample], num_prompt: int) -> int:
    return num_prompt + sum(len(s.trajectory.token_ids) - 1 - num_prompt for s in row)


@pytest.fixture(scope="module")
def make_plain():
    def build(uid: int, num_prompt: int, num_written: int) -> Sample:
        length = num_prompt + num_written
        trajectory: Any = SimpleNamespace(
            uid=uid, token_ids=np.arange(length), policy_mask=np.arange(length) >= num_prompt
        )
        return Sample(trajectory=trajectory, advantage=0.0, first_trained=0)

    return build


def test_padding_changes_no_hidden_state(make, build_policy):
    model = build_policy()
    samples = samples_of(make.groups(3, 3), ObjectiveConfig(advantage="group_mean"))
    batch = collate([[sample] for sample in samples], HELD, torch.float64)
    padded = hidden_states(model, batch.layout)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.trajectory.token_ids[:-1].astype(np.int64))[None]
        alone = model.model(ids).last_hidden_state[0]
        torch.testing.assert_close(padded[row, : ids.shape[1]], alone, rtol=0, atol=1e-6)


@pytest.fixture
def siblings(make) -> list[Sample]:
    """Samples of two prompts, of different lengths, the first with a stale prefix."""
    samples = []
    for uid, num_prompt in ((0, 5), (1, 3)):
        prompt = np.random.default_rng(uid).integers(0, 20, num_prompt)
        for index, num_written in enumerate((4, 1, 6)):
            rng = np.random.default_rng(10 * uid + index)
            trajectory = make.trajectory(
                uid, index, rng, num_prompt=num_prompt, num_written=num_written
            )
            trajectory.token_ids[:num_prompt] = prompt
            first = 2 if (uid, index) == (0, 0) else 0
            samples.append(Sample(trajectory=trajectory, advantage=1.0, first_trained=first))
    return samples


def test_a_shared_prompt_changes_no_log_probability_and_no_gradient(build_policy, siblings):
    model = build_policy()
    shared = [siblings[:3], siblings[3:]]
    results = []
    for rows in (shared, [[sample] for sample in siblings]):
        batch = collate(rows, HELD, torch.float64)
        logprobs_T, entropy_T = score(model, batch)
        loss = (logprobs_T * torch.arange(len(logprobs_T))).sum() + entropy_T.sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((logprobs_T.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_sample_of_a_row_sees_another(build_policy, siblings):
    model = build_policy()
    before = score(model, collate([siblings[:3]], HELD, torch.float64))[0]
    siblings[1].trajectory.token_ids[-1] = 7  # the last token is a target only: never an input
    siblings[2].trajectory.token_ids[5:-1] = 9
    after = score(model, collate([siblings[:3]], HELD, torch.float64))[0]
    count = siblings[0].num_trained
    torch.testing.assert_close(before[:count], after[:count], rtol=0, atol=0)
    assert not torch.allclose(before[count + 1 :], after[count + 1 :])


def test_siblings_share_a_row_and_other_prompts_do_not(siblings):
    (micro_batch,) = plan_micro_batches(siblings, 1000)
    assert sorted([s.trajectory.uid for s in row] for row in micro_batch) == [[0] * 3, [1] * 3]


def test_no_attention_mask_is_built(make, build_policy, monkeypatch):
    model = build_policy("float32")
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask, is_causal))
        return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    piece = Piece(token_ids=np.ones(10, dtype=np.int64), places=np.array([9]))
    hidden_states(model, lay_out([[piece]] * 3))
    assert seen == [(None, True)] * 2


def test_clean_tokens_are_those_of_the_held_version_over_its_own_keys(make):
    old, new = Version(branch=0, step=1), Version(branch=0, step=2, digest="d")
    versions = (VersionSpan(version=old, length=2), VersionSpan(version=new, length=3))
    keys = (VersionSpan(version=old, length=4), VersionSpan(version=new, length=1))
    trajectory = make.trajectory(
        0, 0, np.random.default_rng(0), num_written=5, versions=versions, kv_version_min=keys
    )
    sample = Sample(trajectory=trajectory, advantage=1.0, first_trained=0)
    batch = collate([[sample]], new, torch.float64)
    assert batch.mixed_T.tolist() == [False, False, True, True, False]
    assert batch.clean_T.tolist() == [False] * 4 + [True]


def test_a_resumed_branch_holds_the_weights_of_its_parent():
    parent = Version(branch=0, step=3, digest="d")
    assert same_weights(parent, Version(branch=1, step=3, digest="d"))
    assert not same_weights(parent, Version(branch=1, step=3, digest="e"))
    assert not same_weights(parent, Version(branch=1, step=4, digest="d"))
    assert not same_weights(Version(branch=0, step=3), Version(branch=1, step=3))


def test_kept_sets_follow_their_tokens_and_must_hold_them(make):
    def sample(index, wrong=False, **changes):
        def build(**more):
            fields = {"num_prompt": 3, "num_written": 3, "sampling": SamplingParams(top_k=3)}
            return make.trajectory(0, index, np.random.default_rng(index), **(fields | more))

        tokens = build().token_ids
        rows = [sorted({int(t), 5, 9}) for t in tokens[3:]]
        if wrong:
            rows[2] = [int(tokens[5]) ^ 1]
        fields = {"extras": {"kept_ids": make.ragged(rows)}} | changes
        return Sample(trajectory=build(**fields), advantage=1.0, first_trained=1), rows

    def line_up(samples, law: RatioLaw = "kept_set"):
        return collate([[sample] for sample in samples], HELD, torch.float64, law)

    (first, rows), (second, more) = sample(0), sample(1)
    kept = line_up([first, second]).kept
    want = [*rows[1:], *more[1:]]
    assert kept is not None
    assert kept.ids_M.tolist() == [i for row in want for i in row]
    assert kept.offsets_T1.diff().tolist() == [len(row) for row in want]
    assert line_up([first, second], "temperature").kept is None
    assert line_up([sample(0, sampling=SamplingParams())[0]]).kept is None
    with pytest.raises(CorruptData, match=r"sample 7 of prompt 0.* not in its own kept set"):
        line_up([first, sample(7, wrong=True)[0]])
    with pytest.raises(CorruptData, match=r"sample 3 of prompt 0.* lacks the kept ids"):
        line_up([first, sample(3, extras={})[0]])


def test_greedy_samples_and_promptless_ones_are_refused(make):
    rng = np.random.default_rng(0)
    greedy = make.trajectory(0, 0, rng, sampling=SamplingParams(temperature=0.0))
    with pytest.raises(CorruptData, match="greedily"):
        collate([[Sample(trajectory=greedy, advantage=1.0, first_trained=0)]], HELD, torch.float64)
    bare = make.trajectory(0, 0, rng, num_prompt=0)
    with pytest.raises(CorruptData, match="nothing before it"):
        collate([[Sample(trajectory=bare, advantage=1.0, first_trained=0)]], HELD, torch.float64)


def test_updates_are_whole_groups_in_order(make):
    groups = make.groups(7, 2)
    parts = updates_of(groups[::-1], 3)
    assert [[g.prompt.uid for g in part] for part in parts] == [[0, 1], [2, 3], [4, 5, 6]]

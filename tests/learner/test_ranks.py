"""Several learner ranks do what one does: same losses, same weights, and any number resumes."""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slipstream.buffer.errors import PeerLost, TrainingFailed
from slipstream.learner import loop as loop_module
from slipstream.learner.checkpoint import find_checkpoint
from slipstream.learner.config import LearnerConfig, LoraConfig, ObjectiveConfig
from slipstream.learner.policy import weights_digest
from slipstream.learner.ranks import LOOPBACK, Ranks, own_address
from slipstream.learner.trainer import Trainer

WAIT_S = 60.0


def forked(work: Callable[[], None]) -> int:
    """Run it in a fork; it exits with 0, or 1 and a traceback."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(children: list[int]) -> list[int]:
    """How each ended (negative: the signal), in time, or they are killed."""
    codes, end = {}, time.monotonic() + WAIT_S
    while len(codes) < len(children) and time.monotonic() < end:
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child, -99) for child in children]


def follower(spec) -> None:
    trainer = Trainer(spec)
    trainer.prepare(threading.Event())
    loop_module.follow(trainer)


@pytest.fixture
def run_ranks(run_loop, fake_buffer):
    """`run_ranks(spec, size)`: all ranks of a learner around a fake buffer; rank 0's in a fork, too,
    because a process can join only once."""

    def run(spec, size: int, codes: list[int] | None = None) -> None:
        (spec.run_dir / "processes").mkdir(exist_ok=True)
        specs = [spec.model_copy(update={"rank": r, "ranks": size}) for r in range(size)]

        def first() -> None:
            run_loop(specs[0], fake_buffer()).end()

        children = [forked(first)] + [forked(lambda s=s: follower(s)) for s in specs[1:]]
        assert ended(children) == (codes or [0] * size)

    return run


def with_config(spec, **changes):
    return spec.model_copy(update={"config": spec.config.model_copy(update=changes)})


def elsewhere(spec, name: str, **changes):
    folder = spec.run_dir.parent / name
    folder.mkdir()
    return spec.model_copy(update={"run_dir": folder, **changes})


def weights_of(spec, at=None):
    return load_file(
        find_checkpoint(spec.run_dir / "checkpoints", at)[0].folder / "weights.safetensors"
    )


def assert_alike(spec, other, rows_of, tolerance: float, steps=(1, 2, 3, 4)) -> None:
    want, got = rows_of(spec.run_dir), rows_of(other.run_dir)
    for step in steps:
        own = {"value_loss", "gradient_noise", "gradient_signal"} & want[step].keys()
        for key in ("loss", "grad_norm", "entropy", "ratio_mean", "correction_mean", *own):
            assert got[step][key] == pytest.approx(want[step][key], rel=tolerance, abs=tolerance)
        for key in ("tokens_trained", "proof", "updates", "tokens_processed"):
            assert got[step][key] == want[step][key]
    for name, weight in weights_of(spec).items():
        torch.testing.assert_close(weights_of(other)[name], weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [2, 4])
def test_losses_gradients_and_weights_do_not_depend_on_the_number_of_ranks(
    make_spec, run_loop, run_ranks, fake_buffer, rows_of, size
):
    objective = ObjectiveConfig(proximal="recomputed", kl_coefficient=0.1)
    spec = with_config(make_spec(), updates_per_step=2, micro_batch_tokens=40, objective=objective)
    run_loop(spec, fake_buffer())
    other = elsewhere(spec, "ranks")
    run_ranks(other, size)
    assert_alike(spec, other, rows_of, 1e-9)


@pytest.mark.parametrize(
    ("changes", "dtype", "tolerance"),
    [
        ({"objective": ObjectiveConfig(preset="gspo")}, "float64", 1e-9),
        ({"objective": ObjectiveConfig(proximal="ewma")}, "float64", 1e-9),
        ({"activations": "checkpoint"}, "float64", 1e-9),
        ({"lora": LoraConfig(rank=3)}, "float64", 1e-9),
        ({"objective": ObjectiveConfig(preset="ppo", gae_decay=0.9)}, "float64", 1e-9),
        ({"packed": True, "micro_batch_tokens": 40}, "float64", 1e-9),
        ({"noise_scale": True, "micro_batch_tokens": 20}, "float64", 1e-9),
        ({}, "float32", 1e-5),
    ],
    ids=["sequence", "ewma", "checkpoint", "lora", "critic", "packed", "noise", "float32"],
)
def test_what_works_on_one_rank_works_on_several(
    make_spec, run_loop, run_ranks, fake_buffer, rows_of, changes, dtype, tolerance
):
    spec = with_config(make_spec(dtype=dtype), **changes)
    run_loop(spec, fake_buffer())
    other = elsewhere(spec, "ranks")
    run_ranks(other, 2)
    assert_alike(spec, other, rows_of, tolerance)


def test_bfloat16_ranks_keep_float32_masters_and_publish_them_rounded(make_spec, run_ranks):
    spec = make_spec(dtype="bfloat16")
    run_ranks(spec, 2)
    folder = find_checkpoint(spec.run_dir / "checkpoints")[0].folder
    shards = [load_file(file) for file in sorted(folder.glob("optimizer-*"))]
    for name, weight in weights_of(spec).items():
        masters = torch.cat([each[f"{name}:master"] for each in shards])
        assert masters.dtype == torch.float32
        assert torch.equal(masters.bfloat16(), weight)


def test_a_run_resumes_on_any_number_of_ranks_and_on_the_same_bit_for_bit(
    make_spec, run_loop, run_ranks, fake_buffer, rows_of
):
    spec = with_config(make_spec(steps=2))
    run_loop(spec, fake_buffer())
    whole = elsewhere(with_config(spec, steps=6), "whole")
    run_loop(whole, fake_buffer())
    parents = {1: (0, 2), 2: (1, 4)}
    for branch, size in ((1, 2), (2, 1)):  # one rank, then two, then one
        spec = with_config(spec, steps=parents[branch][1] + 2).model_copy(
            update={
                "branch": branch,
                "branch_parents": {b: p for b, p in parents.items() if b <= branch},
                "resume_from": parents[branch],
            }
        )
        run_ranks(spec, size)
    assert_alike(whole, spec, rows_of, 1e-6, steps=range(1, 7))
    pair = elsewhere(with_config(make_spec(steps=4)), "pair")
    run_ranks(pair, 2)
    again = pair.model_copy(
        update={"branch": 1, "branch_parents": {1: (0, 2)}, "resume_from": (0, 2)}
    )
    want = rows_of(pair.run_dir)
    run_ranks(again, 2)
    assert [rows_of(pair.run_dir)[step]["branch"] for step in (3, 4)] == [1, 1]
    for step in (3, 4):
        assert rows_of(pair.run_dir)[step]["loss"] == want[step]["loss"]
        assert rows_of(pair.run_dir)[step]["digest"] == want[step]["digest"]

"""Several learner ranks do what one does: same losses, same weights, and any number resumes."""

import asyncio
import errno
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import fields

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.records import Version
from slipstream.buffer.staleness import LivePath
from slipstream.kernels.models import assign_weights, checkpoint_layers, load_policy
from slipstream.learner import loop as loop_module
from slipstream.learner import shards
from slipstream.learner.batch import collate, moved, samples_of
from slipstream.learner.checkpoint import find_checkpoint
from slipstream.learner.config import LearnerConfig, LoraConfig, ObjectiveConfig
from slipstream.learner.lora import add_adapters
from slipstream.learner.policy import Policy
from slipstream.learner.ranks import GRAPHS, LOOPBACK, Ranks, compile_layers, own_address
from slipstream.learner.step import train_step
from slipstream.learner.trainer import Trainer
from torch._dynamo.utils import counters
from transformers import LlamaConfig

WAIT_S = 240.0
PROBE = "probe.safetensors"
HELD = Version(branch=0, step=0)

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


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
    """`run_ranks(spec, size)`: all ranks of a learner around a fake buffer, each in a fork, because
    a process can join only once."""

    def run(spec, size: int, codes: list[int] | None = None, buffer=fake_buffer) -> None:
        (spec.run_dir / "processes").mkdir(exist_ok=True)
        specs = [spec.model_copy(update={"rank": r, "ranks": size}) for r in range(size)]

        def first() -> None:
            run_loop(specs[0], buffer()).end()

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
        ({"lora": LoraConfig(rank=3)}, "float64", 1e-9),
        ({"activations": "checkpoint", "stream": True}, "float64", 1e-9),
        slow({"objective": ObjectiveConfig(preset="gspo")}, "float64", 1e-9),
        slow({"objective": ObjectiveConfig(proximal="ewma")}, "float64", 1e-9),
        ({"objective": ObjectiveConfig(preset="ppo", gae_decay=0.9)}, "float64", 1e-9),
        slow({"packed": True, "micro_batch_tokens": 40}, "float64", 1e-9),
        slow({"noise_scale": True, "micro_batch_tokens": 20}, "float64", 1e-9),
        slow({}, "float32", 1e-5),
    ],
    ids=[
        "lora",
        "checkpoint-stream",
        "sequence",
        "ewma",
        "critic",
        "packed",
        "noise",
        "float32",
    ],
)
def test_what_works_on_one_rank_works_on_several(
    make_spec, run_loop, run_ranks, fake_buffer, rows_of, build_policy, changes, dtype, tolerance
):
    spec = with_config(make_spec(dtype=dtype), **changes)
    run_loop(spec, fake_buffer())
    other = elsewhere(spec, "ranks")
    run_ranks(other, 2)
    assert_alike(spec, other, rows_of, tolerance)
    probe = load_file(find_checkpoint(other.run_dir / "checkpoints")[0].folder / PROBE)
    model = build_policy(dtype)
    assign_weights(model, weights_of(other))
    logits = model(probe["token_ids"]).logits.float()
    torch.testing.assert_close(probe["logits"], logits, rtol=0, atol=1e-5)  # what an export meets


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


def test_a_run_that_is_closed_saves_and_lets_every_rank_go(make_spec, fake_buffer, run_loop):
    spec = make_spec(steps=5, take_deadline_s=0.2)
    (spec.run_dir / "processes").mkdir()
    specs = [spec.model_copy(update={"rank": rank, "ranks": 2}) for rank in range(2)]
    buffer = fake_buffer(4, closing=True)
    children = [
        forked(lambda: run_loop(specs[0], buffer).end()),
        forked(lambda: follower(specs[1])),
    ]
    assert ended(children) == [0, 0]
    assert find_checkpoint(spec.run_dir / "checkpoints")[0].version.step == 3


@pytest.mark.parametrize("stopped", [(0,), (0, 1)])
def test_a_stop_while_ranks_prepare_lets_every_rank_go_and_leaves_no_weights(
    make_spec, stopped, monkeypatch
):
    async def run(spec) -> None:
        task, plain = asyncio.current_task(), Trainer.prepare
        assert task is not None
        loop = asyncio.get_running_loop()

        def prepare(self, stop: threading.Event) -> None:
            if spec.rank in stopped:
                loop.call_soon_threadsafe(task.cancel)
                stop.wait()
            plain(self, stop)

        monkeypatch.setattr(Trainer, "prepare", prepare)  # of this fork
        await loop_module.main(spec)

    spec = make_spec()
    (spec.run_dir / "processes").mkdir()
    specs = [spec.model_copy(update={"rank": rank, "ranks": 2}) for rank in (0, 1)]
    assert ended([forked(lambda s=s: asyncio.run(run(s))) for s in specs]) == [0, 0]
    assert not list(spec.weights_dir.iterdir())


def test_a_rank_that_cannot_write_its_part_leaves_the_earlier_checkpoint_and_says_so(
    make_spec, run_ranks, monkeypatch, capfd
):
    ordinary = shards.write_parts

    def write(path, parts):
        if path.name == "optimizer-00002-of-00002.safetensors" and "000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        ordinary(path, parts)

    monkeypatch.setattr(shards, "write_parts", write)
    spec = make_spec(steps=6)
    run_ranks(spec, 2, codes=[1, 1])
    said = capfd.readouterr().err
    assert "TrainingFailed: checkpoint" in said
    assert "optimizer-00002-of-00002.safetensors" in said
    assert "earlier checkpoint: step-000002.b0" in said
    assert find_checkpoint(spec.run_dir / "checkpoints")[0].version.step == 2


@pytest.mark.parametrize("size", [2, slow(3)])
def test_each_rank_writes_its_own_rows_of_what_is_published_and_saved(
    make_spec, run_ranks, monkeypatch, tmp_path, size
):
    ordinary = os.pwrite

    def pwrite(descriptor, data, offset):
        name = os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2]
        with (tmp_path / f"{os.getpid()}.written").open("a") as file:
            file.write(json.dumps([name, len(data)]) + "\n")
        return ordinary(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    spec = make_spec(steps=2)
    spec.weights_dir.mkdir()
    (spec.weights_dir / "weights-0.9.held").write_bytes(b"of a learner that was killed")
    run_ranks(spec, size)
    assert {path.suffix for path in spec.weights_dir.iterdir()} == {".safetensors"}
    num_bytes = sum(w.numel() * w.element_size() for w in weights_of(spec).values())
    published = []
    for path in tmp_path.glob("*.written"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        published.append(sum(n for name, n in rows if name == "weights-0.1.held"))
        moments = sum(n for name, n in rows if name.startswith("optimizer-"))
        random_state = 2 * torch.get_rng_state().numel()  # of steps 0 and 2
        assert 0 < moments - random_state < 2.2 * num_bytes / size
    assert len(published) == size
    assert sum(published) == num_bytes  # every row once
    assert max(published) < 1.1 * num_bytes / size


def test_ranks_of_one_machine_listen_on_the_loopback_interface_alone(tmp_path):
    def meet(rank):
        Ranks.join(rank, 2, tmp_path / "meet", "ipc:///nowhere").exchange(None)
        own = psutil.Process().net_connections(kind="inet")
        listening = [each.laddr.ip for each in own if each.status == psutil.CONN_LISTEN]
        assert listening
        far = [each.raddr.ip for each in own if each.raddr]
        assert {ip.removeprefix("::ffff:") for ip in (*listening, *far)} == {LOOPBACK}

    assert ended([forked(lambda: meet(0)), forked(lambda: meet(1))]) == [0, 0]
    with socket.create_server((LOOPBACK, 0)) as server:
        assert own_address(f"tcp://{LOOPBACK}:{server.getsockname()[1]}") == LOOPBACK


def test_a_rank_that_dies_is_a_lost_peer_to_the_others(make_spec, fake_buffer, run_loop, capfd):
    spec = make_spec(steps=6)
    (spec.run_dir / "processes").mkdir()
    specs = [spec.model_copy(update={"rank": rank, "ranks": 2}) for rank in range(2)]

    def dying() -> None:
        trainer = Trainer(specs[1])
        trainer.prepare(threading.Event())
        trainer.ranks.hear()
        os.kill(os.getpid(), signal.SIGKILL)

    children = [forked(lambda: run_loop(specs[0], fake_buffer())), forked(dying)]
    assert ended(children) == [1, -signal.SIGKILL]
    assert "PeerLost: learner rank 0 lost another rank" in capfd.readouterr().err
    assert find_checkpoint(spec.run_dir / "checkpoints")[0].version.step == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch's own compiler warns itself of
def test_compiled_layers_are_whole_graphs_and_change_no_step_beyond_rounding(
    make_spec, run_loop, run_ranks, fake_buffer, rows_of, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    spec = make_spec(dtype="float32")
    run_loop(spec, fake_buffer())
    sharded = elsewhere(with_config(spec, compile=True), "sharded")
    run_ranks(sharded, 2)  # before this process compiles: its threads would be missing in a fork
    assert_alike(spec, sharded, rows_of, 1e-5)
    counters.clear()
    compiled = elsewhere(sharded, "compiled")
    run_loop(compiled, fake_buffer())
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert_alike(spec, compiled, rows_of, 1e-5)


@pytest.mark.filterwarnings("ignore")  # what torch's own compiler warns itself of
@pytest.mark.parametrize("kind", ["plain", slow("lora"), slow("checkpoint")])
def test_all_layers_and_all_kinds_of_rows_need_few_graphs_and_no_break(
    model_dir, make, tmp_path, record_property, kind
):
    """Torch compiles a function only so often: were it once more for each layer, or each shape of a
    micro-batch, then deep models or long runs would fail. And not so few that a run meets them."""
    deep = LlamaConfig.from_pretrained(model_dir, num_hidden_layers=5)
    deep.save_pretrained(str(tmp_path))
    model = load_policy(tmp_path, "float32", seed=0)
    if kind == "lora":
        add_adapters(model, LoraConfig(rank=2), seed=0)
    elif kind == "checkpoint":
        checkpoint_layers(model)
    compile_layers(model, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    config = LearnerConfig(
        updates_per_step=2, objective=ObjectiveConfig(proximal="recomputed"), micro_batch_tokens=48
    )
    policy = Policy(model, config.optimizer)
    for step, samples in enumerate((1, 2, 5, 9), start=1):
        held = Version(branch=0, step=step - 1)
        batch = make.groups(4, samples, seed=step, version=held)
        for share in (True, False):
            train_step(
                policy, batch, step=step, held=held, path=LivePath(0), max_staleness_steps=9,
                config=config.model_copy(update={"share_prompts": share}),
            )  # fmt: skip
    assert not counters["graph_break"]
    record_property("graphs", counters["stats"]["unique_graphs"])
    assert 0 < counters["stats"]["unique_graphs"] <= GRAPHS // 4


def test_demonstrations_are_dealt_to_ranks_like_a_batch(
    make_spec, run_loop, run_ranks, fake_buffer, make, rows_of
):
    class Showing(fake_buffer):
        async def take(self, step, *, wait_s):
            batch = await super().take(step, wait_s=wait_s)
            shown = make.groups(1, 3, seed=77)[0].samples
            return msgspec.structs.replace(batch, demonstrations=tuple(s.trajectory for s in shown))

    spec = with_config(make_spec(steps=2), micro_batch_tokens=24)
    run_loop(spec, Showing())
    other = elsewhere(spec, "ranks")
    run_ranks(other, 2, buffer=Showing)
    assert_alike(spec, other, rows_of, 1e-9, steps=(1, 2))
    shown = rows_of(other.run_dir)[2]["demonstration_loss"]
    assert shown == pytest.approx(rows_of(spec.run_dir)[2]["demonstration_loss"])
    assert shown > 0


def test_everything_of_a_micro_batch_moves_to_the_device(make):
    rows = [[sample] for sample in samples_of(make.groups(2, 2), ObjectiveConfig())]
    batch = collate(rows, HELD, torch.float32)
    there = moved(batch, torch.device("meta"))
    assert there.layout.input_ids_BL.device.type == "meta"
    tensors = [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)]
    assert len(tensors) >= 8
    assert {getattr(there, name).device.type for name in tensors} == {"meta"}
    assert there.num_inputs == batch.num_inputs


def test_a_device_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, so that there is nothing to refuse")
    with pytest.raises(ConfigError, match=r'learner\.device = "cuda".*use "cpu"'):
        Ranks.join(0, 1, tmp_path / "meet", "ipc:///nowhere", "cuda")

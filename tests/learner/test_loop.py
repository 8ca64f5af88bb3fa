"""The loop: what it publishes when, how long it waits, and how it ends."""

import asyncio
import contextlib
import json
import threading
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from slipstream.buffer.errors import ConfigError, CorruptData, TrainingFailed
from slipstream.buffer.mailbox import verify
from slipstream.buffer.weight_files import Outbox
from slipstream.kernels import streambp
from slipstream.kernels.models import read_weights
from slipstream.learner import loop as loop_module
from slipstream.learner.checkpoint import find_checkpoint
from slipstream.learner.config import LoraConfig, SenderSpec, SftConfig
from slipstream.learner.policy import Policy, weights_digest
from slipstream.learner.trainer import Trainer
from transformers import GPT2Config


def test_every_step_publishes_one_version_whose_digest_is_its_tensors(
    make_spec, fake_buffer, run_loop
):
    spec, buffer = make_spec(steps=3), fake_buffer()
    run_loop(spec, buffer)
    assert [str(m.version) for m in buffer.published] == ["0.0", "0.1", "0.2", "0.3"]
    assert len({m.version.digest for m in buffer.published}) == 4
    for manifest in buffer.published:
        verify(manifest)
        tensors = read_weights([shard.path for shard in manifest.shards])
        assert weights_digest(tensors) == manifest.version.digest
    assert not list(spec.weights_dir.glob("*.partial"))


@pytest.mark.parametrize("adapters", [LoraConfig(), LoraConfig(rank=2, publish="merged")])
def test_each_version_leaves_the_device_once_for_all_who_need_it(
    make_spec, run_loop, fake_buffer, monkeypatch, adapters
):
    """What is published is what is digested, saved and evaluated. The policy's own memory stands in
    for the device's: `cpu` of what lies there is a copy."""
    spec, plain = make_spec(steps=4), Policy.weights
    spec = spec.model_copy(update={"config": spec.config.model_copy(update={"lora": adapters})})
    made: list[dict[str, torch.Tensor]] = []
    copied: list[int] = []

    def weights(policy):
        made.append(plain(policy))
        return made[-1]

    def cpu(tensor):
        if tensor.data_ptr() not in {w.data_ptr() for own in made[-1:] for w in own.values()}:
            return tensor
        copied.append(tensor.data_ptr())
        return tensor.clone()

    monkeypatch.setattr(Policy, "weights", weights)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    run_loop(spec, buffer := fake_buffer())
    assert [version.step for version in buffer.saved] == [0, 2, 4]
    assert len(made) == len(buffer.published) == 5
    assert len(copied) == sum(map(len, made))


def test_metrics_have_one_line_a_step_with_the_proof(make_spec, fake_buffer, run_loop, rows_of):
    spec = make_spec(steps=3)
    run_loop(spec, fake_buffer())
    rows = rows_of(spec.run_dir)
    assert list(rows) == [1, 2, 3]
    assert rows[2]["version"] == "0.2"
    proof = rows[3]["proof"]
    assert proof["violations"] == 0
    assert proof["lag_counts"] == {"2": rows[3]["tokens_trained"]}
    assert (proof["dropped"], proof["length_bias"]) == ({"stale": 1}, 0.9)
    # All samples finished since the last batch, not only those of the batch; without any, these.
    assert (rows[3]["reward_mean"], proof["finished_samples"]) == (0.75, 2)
    assert rows[3]["reward_mean"] != rows[3]["reward_trained_mean"]
    assert rows[1]["reward_mean"] == rows[1]["reward_trained_mean"]
    assert rows[3]["drafts"] == {"drafted_tokens": 90.0, "accepted_tokens": 32.0}
    assert "drafts" not in rows[1]
    for key in ("loss", "reward_mean", "grad_norm", "seconds", "wait_seconds", "tokens_per_s"):
        assert isinstance(rows[1][key], float)


def test_a_batch_that_does_not_come_ends_the_run_and_says_who_was_waited_for(
    make_spec, fake_buffer, run_loop
):
    spec, buffer = make_spec(take_deadline_s=0.3), fake_buffer(2)
    with pytest.raises(TrainingFailed, match=r"step 2 got no batch .* worker-0, which is asleep"):
        run_loop(spec, buffer)
    assert find_checkpoint(spec.run_dir / "checkpoints")[0].version.step == 1  # nothing is lost


def test_a_closing_run_ends_with_a_checkpoint(make_spec, fake_buffer, run_loop, rows_of):
    spec = make_spec(steps=5)
    buffer = fake_buffer(4, closing=True)
    buffer.take_wait = 0
    run_loop(spec.model_copy(update={"take_deadline_s": 0.2}), buffer)
    assert find_checkpoint(spec.run_dir / "checkpoints")[0].version.step == 3
    assert rows_of(spec.run_dir)[3]["status"] == "stopped"


@pytest.mark.parametrize("moment", ["waiting", "training"])
def test_sigterm_ends_at_a_step_boundary_with_a_checkpoint(
    make_spec, fake_buffer, run_loop, rows_of, monkeypatch, moment
):
    spec, buffer = make_spec(steps=9), fake_buffer(4 if moment == "waiting" else 10**9)
    loop_task: dict[str, Any] = {}
    plain = Trainer.train

    def train(self, batch):
        if moment == "training" and batch.step == 3:
            loop_task["loop"].call_soon_threadsafe(loop_task["task"].cancel)
        return plain(self, batch)

    def on_take(step):
        loop_task["loop"] = asyncio.get_running_loop()
        task: Any = asyncio.current_task()
        loop_task["task"] = task
        if moment == "waiting" and step == 4:
            loop_task["loop"].call_soon(task.cancel)

    buffer.on_take = on_take
    monkeypatch.setattr(Trainer, "train", train)
    run_loop(spec, buffer)
    assert find_checkpoint(spec.run_dir / "checkpoints")[0].version.step == 3
    assert [m.version.step for m in buffer.published] == [0, 1, 2, 3]
    assert rows_of(spec.run_dir)[3]["status"] == "stopped"


@pytest.mark.parametrize("gone", [False, True])
def test_the_learner_stays_until_those_who_fetch_its_last_version_have_it_or_are_too_slow(
    make_spec, fake_buffer, monkeypatch, gone
):
    receiving, ended, plain = iter([1, 1, 0]), [], Trainer.end
    count = property(lambda _: 1 if gone else next(receiving))

    def end(self):
        ended.append(list(receiving))
        plain(self)

    @contextlib.asynccontextmanager
    async def client(*_):
        yield fake_buffer()

    monkeypatch.setattr("slipstream.learner.loop.SERVE_S", 0.3 if gone else 60)
    monkeypatch.setattr("slipstream.learner.loop.BufferClient", client)
    monkeypatch.setattr(Outbox, "receiving", count)
    monkeypatch.setattr(Trainer, "end", end)
    asyncio.run(loop_module.main(make_spec(steps=1)))
    assert ended == [[1, 1, 0] if gone else []]


def test_a_stop_is_not_held_up_by_a_buffer_that_is_gone(
    make_spec, fake_buffer, run_loop, monkeypatch
):
    monkeypatch.setattr("slipstream.learner.loop.STOP_PATIENCE_S", 0.05)
    spec, buffer = make_spec(steps=9), fake_buffer()

    async def never(version, resumable_step=0):
        await asyncio.sleep(60)

    def on_take(step):
        if step == 2:
            buffer.checkpoint_saved = never
            task: Any = asyncio.current_task()
            asyncio.get_running_loop().call_soon(task.cancel)

    buffer.on_take = on_take
    buffer.silent_from = 2
    run_loop(spec, buffer)
    assert find_checkpoint(spec.run_dir / "checkpoints")[0].version.step == 1


def test_a_missing_model_and_a_damaged_checkpoint_are_told_apart(
    make_spec, fake_buffer, run_loop, tmp_path
):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        run_loop(make_spec(model_dir=tmp_path / "none"), fake_buffer())
    spec = make_spec(steps=2)
    run_loop(spec, fake_buffer())
    file = spec.run_dir / "checkpoints/step-000002.b0/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    again = {"resume_from": (0, 2), "branch": 1, "branch_parents": {1: (0, 2)}}
    with pytest.raises(CorruptData, match="cut short"):
        run_loop(spec.model_copy(update=again), fake_buffer())


def test_the_kl_reference_is_the_policy_the_run_started_from_also_after_resume(
    make_spec, fake_buffer, run_loop, rows_of
):
    spec = make_spec(steps=4)
    objective = spec.config.objective.model_copy(update={"kl_coefficient": 0.5})
    config = spec.config.model_copy(update={"objective": objective})
    spec = spec.model_copy(update={"config": config})
    run_loop(spec, fake_buffer())
    rows = rows_of(spec.run_dir)
    assert rows[1]["kl_reference"] == pytest.approx(0, abs=1e-12)
    assert rows[3]["kl_reference"] > 1e-9
    want = rows[4]["loss"]
    again = {"resume_from": (0, 2), "branch": 1, "branch_parents": {1: (0, 2)}}
    run_loop(spec.model_copy(update=again), fake_buffer())
    assert rows_of(spec.run_dir)[4]["loss"] == want
    assert rows_of(spec.run_dir)[4]["branch"] == 1


def test_a_warm_start_comes_before_step_zero_and_stops_when_told(make_spec, tmp_path):
    file = tmp_path / "sft.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(f"{json.dumps({'messages': chat})}\n" * 8)
    sft = SftConfig(batch_size=2, epochs=2, learning_rate=1e-2, threads=1)
    spec = make_spec(sft=sft, sft_file=file, dtype="float32")
    cold, warm, stopped = Trainer(make_spec(dtype="float32")), Trainer(spec), Trainer(spec)
    cold.prepare(threading.Event())
    warm.prepare(threading.Event())
    assert cold.held.digest != warm.held.digest
    rows = [json.loads(x) for x in (spec.run_dir / "sft_metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 8]
    assert rows[-1]["updates"] == 8
    told = threading.Event()
    told.set()
    stopped.prepare(told)
    assert not stopped.saved
    assert stopped.held.digest == cold.held.digest
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("kind", ["checkpoint", "stream"])
def test_saving_activation_memory_changes_no_step_beyond_rounding(
    kind, make_spec, run_loop, fake_buffer, rows_of, monkeypatch
):
    used = count_calls(monkeypatch, kind)
    spec = make_spec()
    run_loop(spec, fake_buffer())
    want = rows_of(spec.run_dir)
    assert not used
    config = spec.config.model_copy(update={"activations": kind, "stream_tokens": 3})
    run_loop(spec.model_copy(update={"config": config}), fake_buffer())
    got = rows_of(spec.run_dir)
    assert used
    for step in (1, 2, 3, 4):
        for name in ("loss", "grad_norm", "entropy"):
            assert got[step][name] == pytest.approx(want[step][name], rel=1e-5, abs=1e-9)


def count_calls(monkeypatch, kind) -> list[None]:
    """One item for each time a layer is run the way of `kind`."""
    used: list[None] = []
    owner, name = {
        "checkpoint": (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
        "stream": (streambp, "_chunk_output"),
    }[kind]
    original = getattr(owner, name)

    def counted(*arguments, **options):
        used.append(None)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return used


def test_a_model_that_cannot_be_streamed_is_refused_with_key_and_reason(make_spec, tmp_path):
    folder = tmp_path / "gpt2"
    GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=64).save_pretrained(str(folder))
    spec = make_spec(model_dir=folder)
    config = spec.config.model_copy(update={"activations": "stream"})
    trainer = Trainer(spec.model_copy(update={"config": config}))
    with pytest.raises(ConfigError, match=r'learner\.activations = "stream": GPT2Model cannot be'):
        trainer.prepare(threading.Event())


def test_a_run_that_trains_parts_as_they_come_publishes_what_whole_batches_make(
    make_spec, fake_buffer, run_loop, rows_of
):
    losses = []
    for stream in (False, True):
        spec, buffer = make_spec(steps=3), fake_buffer()
        spec = spec.model_copy(update={"config": spec.config.model_copy(update={"stream": stream})})
        spec = spec.model_copy(update={"run_dir": spec.run_dir / f"stream-{stream}"})
        spec.run_dir.mkdir()
        run_loop(spec, buffer)
        assert [str(m.version) for m in buffer.published] == ["0.0", "0.1", "0.2", "0.3"]
        losses.append([row["loss"] for row in rows_of(spec.run_dir).values()])
        assert buffer.parts == (3 if stream else 0)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_who_sends_weights_is_looked_after_while_a_batch_is_waited_for(
    make_spec, fake_buffer, run_loop, monkeypatch
):
    """Engines that have no weights write nothing, so no batch would come."""
    looked_after, buffer = [], fake_buffer(1)
    monkeypatch.setattr("slipstream.learner.loop.POLL_S", 0.05)

    def keep_sender(self):
        looked_after.append(self.held.step)
        if len(looked_after) == 4:  # once when it published, thrice while it waited
            buffer.silent_from = 10**9

    monkeypatch.setattr(Trainer, "keep_sender", keep_sender)
    run_loop(make_spec(steps=1), buffer)
    assert looked_after == [0, 0, 0, 0, 1]


def test_who_sends_weights_is_started_again_when_it_ended_and_outstays_the_last_version(make_spec):
    """Without vLLM it ends by itself, at once."""
    run_dir = make_spec().run_dir
    (run_dir / "processes").mkdir()
    sender = SenderSpec(run_dir=run_dir, endpoint="ipc:///nowhere", backend="nccl", deadline_s=1.0)
    trainer = Trainer(make_spec(sender=sender))
    trainer.prepare(threading.Event())
    trainer.write_weights()
    first = trainer._sender
    assert first is not None
    trainer.keep_sender()
    assert trainer._sender is first
    assert first.wait(120) != 0
    trainer.keep_sender()
    second = trainer._sender
    assert second is not None
    assert second.pid != first.pid
    second.kill()
    second.wait()
    sender.served_file.write_text('["0.0", "0.7"]')
    assert trainer.receiving  # an engine lacks 0.0
    sender.served_file.write_text('["0.0"]')
    assert not trainer.receiving

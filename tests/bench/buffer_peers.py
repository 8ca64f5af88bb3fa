# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""The peers' side of `bench_buffer`, run by their own Python: prints one JSON object.

`transferqueue`: `kv_put`, `kv_batch_put` and `kv_batch_get` of TransferQueue with its default
configuration (memory, two storage units). `ray`: `ray.util.queue.Queue`, one actor. Neither is
durable. A row is a trajectory of 512 tokens: ids (int32), policy mask (bool), log-probabilities
(float32).
"""

import json
import sys
import tempfile
import time

import ray
import torch

TOKENS, BATCH = 512, 64


def rows(number: int) -> dict:
    """Fields of so many trajectories."""
    return {
        "token_ids": torch.zeros(number, TOKENS, dtype=torch.int32),
        "policy_mask": torch.ones(number, TOKENS, dtype=torch.bool),
        "behaviour_logprobs": torch.full((number, TOKENS), -0.5),
    }


def rate(work, number: int) -> float:
    """Rows a second of `work(i)`, which moves `number // calls` rows a call."""
    began = time.perf_counter()
    work()
    return number / (time.perf_counter() - began)


def transferqueue(singles: int, batches: int, repeats: int) -> dict:
    """Puts one by one, puts and gets of 64."""
    import transfer_queue as tq
    from tensordict import TensorDict

    began = time.perf_counter()
    tq.init()
    start_s = time.perf_counter() - began
    one = {name: value[0] for name, value in rows(1).items()}
    many = TensorDict(rows(BATCH), batch_size=BATCH)
    result: dict = {"start_s": start_s, "put": [], "put_64": [], "take_64": []}
    for repeat in range(repeats + 1):  # the first is the warm-up
        names = [[f"{repeat}/{i}/{j}" for j in range(BATCH)] for i in range(batches)]

        def put(repeat: int = repeat) -> None:
            for i in range(singles):
                tq.kv_put(f"{repeat}/one/{i}", "train", one)

        def put_64(names: list = names) -> None:
            for keys in names:
                tq.kv_batch_put(keys, "train", many)

        def take_64(names: list = names) -> None:
            for keys in names:
                tq.kv_batch_get(keys, "train")

        measured = {
            "put": rate(put, singles),
            "put_64": rate(put_64, BATCH * batches),
            "take_64": rate(take_64, BATCH * batches),
        }
        for keys in names:
            tq.kv_clear(keys, "train")
        if repeat:
            for name, value in measured.items():
                result[name].append(value)
    tq.close()
    return result


def ray_queue(singles: int, batches: int, repeats: int) -> dict:
    """The same through one queue actor."""
    from ray.util.queue import Queue

    began = time.perf_counter()
    queue = Queue()
    start_s = time.perf_counter() - began
    one = {name: value[0].numpy() for name, value in rows(1).items()}
    result: dict = {"start_s": start_s, "put": [], "put_64": [], "take_64": []}
    for repeat in range(repeats + 1):

        def put() -> None:
            for _ in range(singles):
                queue.put(one)

        def put_64() -> None:
            for _ in range(batches):
                queue.put_nowait_batch([one] * BATCH)

        def take_64() -> None:
            for _ in range(batches):
                queue.get_nowait_batch(BATCH)

        measured = {"put": rate(put, singles)}
        queue.get_nowait_batch(singles)
        measured["put_64"] = rate(put_64, BATCH * batches)
        measured["take_64"] = rate(take_64, BATCH * batches)
        if repeat:
            for name, value in measured.items():
                result[name].append(value)
    queue.shutdown()
    return result


def lmdb_rows(singles: int, batches: int) -> dict:
    """Rows of 200 bytes a second in synced transactions of 1 and of 64."""
    import lmdb

    result = {}
    for size, number in ((1, singles), (BATCH, batches)):
        with tempfile.TemporaryDirectory(dir="runs") as folder:
            store = lmdb.open(folder, map_size=1 << 30)  # syncs every transaction by default
            began = time.perf_counter()
            for i in range(number):
                with store.begin(write=True) as transaction:
                    for j in range(size):
                        transaction.put((i * size + j).to_bytes(8, "big"), bytes(200))
            result[str(size)] = number * size / (time.perf_counter() - began)
            store.close()
    return result


if __name__ == "__main__":
    peer, singles, batches, repeats = sys.argv[1], *map(int, sys.argv[2:5])
    if peer == "lmdb":
        print("RESULT " + json.dumps(lmdb_rows(singles, batches)), flush=True)
        sys.exit()
    # Its controller and each of its two storage units ask for a CPU of Ray's books.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    run = transferqueue if peer == "transferqueue" else ray_queue
    print("RESULT " + json.dumps(run(singles, batches, repeats)), flush=True)
    ray.shutdown()

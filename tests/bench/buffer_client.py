"""One client process of `bench_buffer`: puts trajectories that it holds leases for.

Told on stdin, line by line: `claim N`, `put`, `put64`, `quit`; answers with a line of JSON.
"""

import asyncio
import contextlib
import json
import sys
import time

import numpy as np
from slipstream.buffer.client import BufferClient
from slipstream.buffer.records import (
    SamplingParams,
    Score,
    Timings,
    Trajectory,
    Version,
    VersionSpan,
)

TOKENS, BATCH, IN_FLIGHT = 512, 64, 256
IDS = np.zeros(TOKENS, np.int32)
MASK = np.arange(TOKENS) >= 32
LOGPROBS = np.full(TOKENS - 32, -0.5, np.float32)


def trajectory(uid: int, index: int, attempt: int, version: Version) -> Trajectory:
    """A sample of 512 tokens, 32 of them the prompt."""
    spans = (VersionSpan(version=version, length=TOKENS - 32),)
    return Trajectory(
        uid=uid,
        attempt=attempt,
        index=index,
        token_ids=IDS,
        policy_mask=MASK,
        behaviour_logprobs=LOGPROBS,
        versions=spans,
        kv_version_min=spans,
        sampling=SamplingParams(),
        finish_reason="stop",
        text="",
        score=Score(value=float(index)),
        turns=(),
        timings=Timings(claimed_s=0.0, first_token_s=0.0, generated_s=0.0, scored_s=0.0),
        engine_id="bench",
    )


async def put_all(client: BufferClient, held: list, size: int) -> float:
    """Hand everything in, `size` trajectories a message, some messages in flight; seconds."""
    messages = [held[i : i + size] for i in range(0, len(held), size)]
    place = iter(messages)

    async def sender() -> None:
        for chunk in place:
            if size == 1:
                await client.finish(*chunk[0])
            else:
                await client.finish_many(chunk)

    began = time.perf_counter()
    await asyncio.gather(*(sender() for _ in range(IN_FLIGHT if size == 1 else 4)))
    return time.perf_counter() - began


class Puts:
    """One connection: claims and hands in."""

    def __init__(self, client: BufferClient) -> None:
        self.client = client
        self.held: list = []

    async def claim(self, number: int) -> dict:
        """Claim so many samples and make them."""
        manifest = (await self.client.await_version()).manifest
        assert manifest is not None
        serving = manifest.version
        claims = await self.client.claim(serving, number)
        self.held = [
            (trajectory(c.ticket.prompt.uid, index, c.attempt, serving), c.lease_id)
            for c in claims.claims
            for index in c.indices
        ]
        return {"rows": len(self.held)}

    async def put(self, size: int) -> dict:
        """Hand in what is held."""
        return {"seconds": await put_all(self.client, self.held, size), "rows": len(self.held)}


async def main() -> None:
    """Obey."""
    endpoint, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    async with contextlib.AsyncExitStack() as stack:
        clients = [BufferClient(endpoint, "bench", f"{name}.{i}") for i in range(number)]
        puts = [Puts(await stack.enter_async_context(client)) for client in clients]
        while True:
            words = (await asyncio.to_thread(sys.stdin.readline)).split() or ["quit"]
            began = time.perf_counter()
            if words[0] == "claim":
                answers = [await each.claim(int(words[1])) for each in puts]
            elif words[0] in ("put", "put64"):
                size = 1 if words[0] == "put" else BATCH
                answers = await asyncio.gather(*(each.put(size) for each in puts))
            else:
                return
            seconds = time.perf_counter() - began
            rows = sum(answer["rows"] for answer in answers)
            print(json.dumps({"seconds": seconds, "rows": rows}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())

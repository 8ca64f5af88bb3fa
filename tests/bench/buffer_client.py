"""One client process of `bench_buffer`: puts trajectories that it holds leases for.

Told on stdin, line by line: `claim N`, `put`, `put64`, `quit`; answers with a line of JSON.
"""

import asyncio
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


async def main() -> None:
    """Obey."""
    endpoint, name = sys.argv[1:3]
    async with BufferClient(endpoint, "bench", name) as client:
        held: list = []
        while True:
            words = (await asyncio.to_thread(sys.stdin.readline)).split() or ["quit"]
            answer: dict = {}
            if words[0] == "claim":
                manifest = (await client.await_version()).manifest
                assert manifest is not None
                serving = manifest.version
                claims = await client.claim(serving, int(words[1]))
                held = [
                    (
                        trajectory(c.ticket.prompt.uid, index, c.attempt, serving),
                        c.lease_id,
                    )
                    for c in claims.claims
                    for index in c.indices
                ]
                answer = {"rows": len(held)}
            elif words[0] in ("put", "put64"):
                answer = {"seconds": await put_all(client, held, 1 if words[0] == "put" else BATCH)}
                answer["rows"] = len(held)
            else:
                return
            print(json.dumps(answer), flush=True)


asyncio.run(main())

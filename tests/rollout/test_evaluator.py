"""Held-out samples are scored whole, whatever becomes of the engine meanwhile."""

import asyncio
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from slipstream.buffer import waits
from slipstream.buffer.messages import EvaluationClaim
from slipstream.buffer.records import (
    Message,
    Prompt,
    SamplingParams,
    Score,
    Version,
    WeightsManifest,
)
from slipstream.kernels.models import load_tokenizer, render_prompt
from slipstream.rollout.config import EnvironmentConfig
from slipstream.rollout.engines.outputs import unstarted
from slipstream.rollout.environments.episode import Player
from slipstream.rollout.evaluator import Evaluator

TINY = Path(__file__).parents[2] / "kernels" / "tiny"
ENVIRONMENT = """
from slipstream.rollout.environments.base import Step

class Three:
    def __init__(self):
        self.left = 3
    def reset(self, prompt):
        return Step()
    def step(self, action):
        self.left -= 1
        return Step(observation="go on", reward=1.0, done=self.left == 0)
"""


class Mortal:
    """The native engine, dead after so many calls until it is loaded again, as vLLM's is."""

    def __init__(self, engine, calls: int) -> None:
        self.engine, self.calls, self.loads, self.close = engine, calls, 0, engine.close

    async def load(self, manifest):
        self.loads += 1
        if self.loads > 1:
            self.calls = 1000
        await self.engine.load(manifest)

    async def generate(self, requests):
        self.calls -= 1
        if self.calls < 0:
            for request in requests:
                yield unstarted(request, "")
        else:
            async for output in self.engine.generate(requests):
                yield output


def registered():
    """(owner without the sample's number, what) of the waits there are."""
    return {
        (wait.owner.rpartition(" ")[0] if "sample" in wait.owner else wait.owner, wait.what)
        for wait in waits.published(0, 0.0).waits
    }


async def test_a_sample_that_the_engine_loses_is_waited_for_since_its_last_token():
    class Loses:
        """Writes a token now and then, and never ends."""

        written, loading = 0, None

        def stats(self):
            return SimpleNamespace(generated_tokens=self.written)

        async def load(self, manifest):
            self.loading = registered()

        async def generate(self, requests):
            await asyncio.Event().wait()
            yield

        async def close(self):
            pass

    engine, nobody = Loses(), cast(Any, None)
    evaluator = Evaluator(
        lambda: cast(Any, engine), lambda messages: [3], nobody, nobody, seed=3, name="worker-0"
    )
    prompt = Prompt(uid=1, source_id="t/1", task="t", messages=())
    manifest = WeightsManifest(version=Version(branch=0, step=4), shards=())
    claim = EvaluationClaim(
        job_id="e", manifest=manifest, prompt=prompt, indices=(0,), sampling=SamplingParams()
    )
    task = asyncio.create_task(evaluator.evaluate([claim]))
    while engine.loading is None or not registered():
        await asyncio.sleep(0.01)
    assert engine.loading == {("worker-0", "its evaluation engine to start and load 0.4")}
    assert registered() == {("held-out prompt 1 sample", "the evaluation engine of worker-0")}
    ages = []
    for engine.written in (0, 5, 5):
        await asyncio.sleep(0.2)
        evaluator.beat()
        ages.append(waits.published(0, time.monotonic()).waits[0].waited_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    waits.put(("e", 1, 0))
    assert ages[0] >= 0.2 > ages[1] < ages[2]


async def test_a_held_out_prompt_that_kills_the_engine_each_time_fails_and_the_others_are_scored():
    class Dies:
        deaths = 0

        async def load(self, manifest):
            pass

        async def generate(self, requests):
            died = any(request.prompt_token_ids == (2,) for request in requests)
            self.deaths += died
            for request in requests:
                whole = msgspec.structs.replace(unstarted(request), finish_reason="stop")
                yield unstarted(request) if died else whole

    class Collected:
        async def finish_evaluation(self, *, uid, index, score, **rest):
            results[uid, index] = score

    class Ones:
        def describe(self):
            return "ones"

        async def score(self, completion, prompt):
            return Score(value=1.0)

    engine, results = Dies(), {}
    evaluator = Evaluator(
        lambda: cast(Any, engine), lambda messages: [int(messages[0].content)], cast(Any, Ones()),
        Collected(), seed=3, name="worker-0",
    )  # fmt: skip
    manifest = WeightsManifest(version=Version(branch=0, step=4), shards=())
    claims = [
        EvaluationClaim(
            job_id="e", manifest=manifest, indices=(0, 1), sampling=SamplingParams(),
            prompt=Prompt(uid=uid, source_id="t", task="t",
                          messages=(Message(role="user", content=str(uid)),)),
        )
        for uid in (1, 2, 3)
    ]  # fmt: skip
    await evaluator.evaluate(claims)
    assert engine.deaths == 3
    assert {place: score.value for place, score in results.items()} == {
        (uid, index): None if uid == 2 else 1.0 for uid in (1, 2, 3) for index in (0, 1)
    }
    assert results[2, 0].reason == "the engine died 3 times over it"
    assert not registered()


@pytest.mark.parametrize("plays", [True, False])
async def test_samples_that_an_engines_death_cut_off_are_generated_anew(tiny, tmp_path, plays):
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    (tmp_path / "mine.py").write_text(ENVIRONMENT)
    engine, tokenizer = Mortal(tiny.engine(folder), 7 if plays else 0), load_tokenizer(folder)
    config = EnvironmentConfig(name=f"{tmp_path}/mine.py:Three", max_turn_tokens=4)
    results = []

    class Collected:
        async def finish_evaluation(self, *, index, score, **rest):
            results.append((index, score.value))

    class Ones:
        def describe(self):
            return "ones, pid 1"

        async def score(self, completion, prompt):
            assert completion.finish_reason != "abort"
            assert ("held-out prompt 1 sample", "reward ones, pid 1") in registered()
            return Score(value=3.0)

    evaluator = Evaluator(
        lambda: engine,  # type: ignore
        lambda messages: render_prompt(tokenizer, messages),
        Ones(),  # type: ignore
        Collected(),
        seed=3,
        name="worker-0",
        player=Player(config, tokenizer) if plays else None,
    )
    prompt = Prompt(uid=1, source_id="t/1", task="t", messages=(Message(role="user", content="a"),))
    manifest = tiny.publish(tiny.policy(folder, 1), 0)
    claim = EvaluationClaim(
        job_id="e", manifest=manifest, prompt=prompt, indices=(0, 1, 2, 3),
        sampling=SamplingParams(max_new_tokens=60),
    )  # fmt: skip
    await evaluator.evaluate([claim])
    assert not registered()
    assert engine.loads == 2
    assert sorted(results) == [(index, 3.0) for index in range(4)]

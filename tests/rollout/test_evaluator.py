"""Held-out samples are scored whole, whatever becomes of the engine meanwhile."""

import shutil
from pathlib import Path

import pytest
from slipstream.buffer.messages import EvaluationClaim
from slipstream.buffer.records import Message, Prompt, SamplingParams, Score
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
        async def score(self, completion, prompt):
            assert completion.finish_reason != "abort"
            return Score(value=3.0)

    evaluator = Evaluator(
        lambda: engine,  # type: ignore
        lambda messages: render_prompt(tokenizer, messages),
        Ones(),  # type: ignore
        Collected(),
        seed=3,
        player=Player(config, tokenizer) if plays else None,
    )
    prompt = Prompt(uid=1, source_id="t/1", task="t", messages=(Message(role="user", content="a"),))
    manifest = tiny.publish(tiny.policy(folder, 1), 0)
    claim = EvaluationClaim(
        job_id="e", manifest=manifest, prompt=prompt, indices=(0, 1, 2, 3),
        sampling=SamplingParams(max_new_tokens=60),
    )  # fmt: skip
    await evaluator.evaluate([claim])
    assert engine.loads == 2
    assert sorted(results) == [(index, 3.0) for index in range(4)]

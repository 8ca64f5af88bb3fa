"""`python -m slipstream.rollout.evaluate SPEC.json`: weights scored on held-out prompts, outside
any run. Prints one JSON object per set of weights, as it is done."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from ..buffer.errors import ConfigError, SlipstreamError
from ..buffer.mailbox import file_digest
from ..buffer.messages import EvaluationClaim, EvaluationResults, FinishEvaluation
from ..buffer.records import Shard, Version, WeightsManifest
from ..kernels.models import load_tokenizer, render_prompt
from .config import EvaluateSpec
from .environments.episode import Player
from .evaluation import pass_at, summary
from .evaluator import Evaluator
from .prompts import PromptSource
from .rewards.pool import RewardPool
from .worker import make_engine


class Collected:
    """Takes the results that an evaluator hands in."""

    def __init__(self) -> None:
        self.results: list[FinishEvaluation] = []

    async def finish_evaluation(self, **result: Any) -> None:
        """Keep one."""
        self.results.append(FinishEvaluation(**result))


async def evaluate(spec: EvaluateSpec, told: TextIO) -> None:
    """Score each set of weights on the same prompts with the same random numbers; a line each goes
    to `told`.

    Raises:
        ConfigError: there are no held-out prompts, or the model or the reward cannot be loaded.
        CorruptData: weights do not fit the model.
        TrainingFailed: rewards fail more often than allowed.
    """
    prompts = PromptSource(spec.prompts, spec.seed).held_out()
    if not prompts:
        raise ConfigError("prompts.held_out = 0 leaves nothing to evaluate on; set it above 0")
    tokenizer, collected = load_tokenizer(spec.model_dir), Collected()
    player = Player(spec.environment, tokenizer) if spec.environment else None
    async with RewardPool(spec.reward) as rewards:
        evaluator = Evaluator(
            lambda: make_engine(spec, "eval"),
            partial(render_prompt, tokenizer),
            rewards,
            collected,
            spec.seed,
            spec.name,
            player,
        )
        try:
            for number, weights in enumerate(spec.weights):
                began_s, collected.results = time.monotonic(), []
                manifest = _manifest(number, weights.files)
                await evaluator.evaluate(
                    [
                        EvaluationClaim(
                            job_id=weights.name,
                            manifest=manifest,
                            prompt=prompt,
                            indices=tuple(range(spec.eval.samples_per_prompt)),
                            sampling=spec.eval.sampling(spec.rollout.sampling),
                        )
                        for prompt in prompts
                    ]
                )
                rewards.raise_if_failing()
                line = _line(weights.name, collected.results, began_s)
                print(json.dumps(line), file=told, flush=True)
        finally:
            await evaluator.close()
            if player is not None:
                await player.close()


def _manifest(number: int, files: Sequence[Path]) -> WeightsManifest:
    """Files as a version of their own, so that the engine loads each set."""
    digests = [(file, *file_digest(file)) for file in files]
    return WeightsManifest(
        version=Version(branch=0, step=number),
        shards=tuple(Shard(path=str(f), num_bytes=size, digest=d) for f, size, d in digests),
    )


def _line(name: str, results: Sequence[FinishEvaluation], began_s: float) -> dict[str, Any]:
    """As a line of `eval.jsonl`, with pass@k instead of the version."""
    done = EvaluationResults(job_id=name, version=Version(branch=0, step=0), results=tuple(results))
    line = summary(done, time.monotonic() - began_s)
    for key in ("version", "branch", "step"):
        del line[key]
    return {"weights": name, **line, "pass_at": pass_at(results)}


def main() -> int:
    """Evaluate what a spec file describes; the reason on stderr with a non-zero code if not."""
    spec = EvaluateSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what rewards and vLLM print is no result
    try:
        asyncio.run(evaluate(spec, told))
    except SlipstreamError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

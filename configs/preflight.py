"""Tries model, prompts and reward before a run starts; writes the examples of its warm start.

A process of its own, because a user's code may hang, crash or print at import.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..buffer.errors import ConfigError
from ..buffer.process import run_process
from ..buffer.records import Completion, Prompt, Score
from ..rollout.config import RewardConfig
from ..rollout.demonstrations import write_sft_file
from ..rollout.environments.base import load_environment
from ..rollout.prompts import PromptSource
from ..rollout.rewards.pool import RewardPool
from .specs import PreflightSpec

PROBED_PROMPTS = 2


async def preflight(spec: PreflightSpec) -> None:
    """Check everything that can be checked without training.

    Raises:
        ConfigError: a model folder that does not load, no prompts, a reward that cannot be loaded
            or fails on every probe, or no examples for the warm start.
    """
    if spec.model_folder is not None:
        await asyncio.to_thread(check_model, spec.model_folder)
    source = PromptSource(spec.prompts, spec.seed)
    probed = [source.prompt(uid) for uid in range(PROBED_PROMPTS)]
    if spec.environment is not None:
        load_environment(spec.environment)
    # At once, on two cores: both are on the way to the first step.
    checks = [check_reward(spec.reward, probed)] if spec.reward is not None else []
    tasks = [asyncio.ensure_future(w) for w in (*checks, asyncio.to_thread(write_examples, spec))]
    try:
        await asyncio.gather(*tasks)
    finally:  # in order: the event loop's end would cancel a reward process being started, too
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def check_model(folder: Path) -> None:
    """Load tokenizer and config as the run's processes will, and build the model without memory.

    Raises:
        ConfigError: they cannot be read, or name an architecture that is not there.
    """
    # Here and not above: seconds of import that a run of a built-in model need not wait for.
    import torch

    from ..kernels.models import ModelError, empty_model, load_tokenizer

    try:
        load_tokenizer(folder)
        with torch.device("meta"):
            empty_model(folder, "float32")
    except ModelError as error:
        raise ConfigError(f'model = "{folder}": {error}') from None
    except ValueError as error:  # readable, of something else than a language model
        raise ConfigError(
            f'model = "{folder}": {folder / "config.json"} names no causal language model: {error}'
        ) from None


def write_examples(spec: PreflightSpec) -> None:
    """Write the warm start's examples, when there is a warm start.

    Raises:
        ConfigError: a demonstrator or a file that cannot be used.
    """
    if spec.sft is not None and spec.sft_file is not None:
        write_sft_file(spec.prompts, spec.sft, spec.seed, spec.sft_file)


async def check_reward(reward: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """Let the reward score something once: one answer that it can score is enough.

    Raises:
        ConfigError: it failed on all of them, or took longer than its time-out.
    """
    pool = RewardPool(reward, num_processes=1)
    failures: list[Score] = []
    try:
        for completion, prompt in _probes(prompts):
            began = time.monotonic()
            score = await pool.score(completion, prompt)
            if score.status == "scored":
                return
            failures.append(score)
            if time.monotonic() - began >= reward.timeout_s:
                break  # it would only take that long again
    finally:
        await pool.close()
    raise ConfigError(
        f'reward.name = "{reward.name}" could not score any of {len(failures)} trial '
        f"answers: {failures[0].reason}. Try it alone, and return a finite number or a Score "
        "within reward.timeout_s"
    )


def _probes(prompts: Sequence[Prompt]) -> list[tuple[Completion, Prompt]]:
    """The gold answer, where there is one, and an empty answer, for each prompt."""
    texts = [(str(prompt.payload.get("answer", "")), "") for prompt in prompts]
    return [
        (Completion(text=text), prompt)
        for prompt, both in zip(prompts, texts, strict=True)
        for text in dict.fromkeys(both)
    ]


def main() -> None:
    """`python -m slipstream.configs.preflight SPEC.json`."""
    spec = PreflightSpec.model_validate_json(Path(sys.argv[1]).read_text())
    run_process("preflight", spec.run_dir, preflight(spec))


if __name__ == "__main__":
    main()

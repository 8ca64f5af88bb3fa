"""The process that puts published weights into vLLM's engines by vLLM's own backends, nccl or ipc.

Beside learner rank 0, on its device, so that a peer that hangs holds no training up.

    worker                               sender
    connect, token                       one thread a connection, one connection a core
    verify v                     ->      the digests of its files
    send v                       ->      `waiting` every second, while others are sent to; then
                                         vLLM's trainer engine, which calls the core through us:
    init, start, update, finish  <-        init once a core; the bytes go from device to device
    "" or what went wrong        ->      each of them
                                 <-      done

A connection that ends or says nothing for `deadline_s`, and what its bytes may take, aborts its
communicator. What vLLM's rendezvous exchanges is neither encrypted nor authenticated: as between
learner ranks, the network is trusted.
"""

# pyright: reportMissingImports=false

import asyncio
import base64
import hmac
import json
import os
import pickle
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from ..buffer.errors import PeerLost, SlipstreamError, TrainingFailed
from ..buffer.filesystem import put_text
from ..buffer.mailbox import confirm, moving_s, verify
from ..buffer.process import run_process
from ..buffer.records import WeightsManifest
from ..kernels.models import DTYPE_NAMES
from .config import SenderSpec
from .ranks import own_address

BUFFER_BYTES = 2**28
"""Of the device, for what travels at once (nccl: twice); or the largest tensor, when that is more:
vLLM's ipc refuses one that does not fit."""
_GREETING_S = 10.0
_TURN_S = 1.0
"""How often an engine hears that others come before it."""
_LINE_BYTES = 2**26
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Files(WeightSource):
    """The tensors of a published version, by their transformers names."""

    def __init__(self, manifest: WeightsManifest, device: str) -> None:
        """Nothing is read yet."""
        self.manifest, self._device = manifest, device

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes, in the order of iteration."""
        found = []
        for shard in self.manifest.shards:
            with safe_open(shard.path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    found.append(ParamMeta(name, _DTYPES[part.get_dtype()], shape))
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for shard in self.manifest.shards:
            with safe_open(shard.path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name).to(self._device)


def init_info(spec: SenderSpec, engine_ranks: int, source: Files) -> TrainerInitInfo:
    """What vLLM's trainer engine is made from.

    Args:
        spec: says which backend.
        engine_ranks: of the engine it sends to (`rollout.vllm.tensor_parallel`).
        source: whose largest tensor has to fit.
    """
    sizes = (meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in source.metadata())
    room: dict[str, Any] = {
        "rank": 0, "packed": True, "packed_buffer_size_bytes": max(BUFFER_BYTES, *sizes)
    }  # fmt: skip
    if spec.backend == "ipc":
        return IPCTrainerInitInfo(**room)
    address = own_address(spec.endpoint)
    with socket.create_server((address, 0)) as free:  # vLLM opens the port itself
        port = free.getsockname()[1]
    return NCCLTrainerInitInfo(
        master_address=address, master_port=port, world_size=1 + engine_ranks, **room
    )


class Line:
    """JSON objects over a connection, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        """Read and write under the connection's timeout."""
        self.connection, self._file = connection, connection.makefile("rb")

    def read(self, most_bytes: int = _LINE_BYTES) -> dict[str, Any]:
        """The next object.

        Raises:
            OSError: the other side is gone or silent.
            ValueError: it said something else.
        """
        line = self._file.readline(most_bytes)
        if not line:
            raise ConnectionError("the connection has ended")
        return json.loads(line)

    def write(self, value: dict[str, Any]) -> None:
        """Say something."""
        self.connection.sendall(json.dumps(value).encode() + b"\n")


class Client(VLLMWeightSyncClient):
    """For one core: calls relayed to the worker that has it."""

    def __init__(self, line: Line) -> None:
        """Nothing is sent yet; `trainer` is the engine that calls, once there is one."""
        self.line = line
        self.trainer: Any = None
        self.manifest: WeightsManifest | None = None

    def _call(self, name: str, argument: Any = None) -> None:
        """Have the core do it. Anything else than success aborts the communicator, in which the
        caller, or another thread of it, may be waiting for a peer that will not come.

        Raises:
            PeerLost: the engine is gone, or said nothing within the deadline.
            TrainingFailed: the engine says that it cannot.
        """
        try:
            self.line.write({"call": name, "argument": argument})
            error = self.line.read()["error"]
        except (OSError, ValueError) as lost:
            abort(self)
            raise PeerLost(f"{name}: the engine is lost: {lost}") from lost
        if error:
            abort(self)
            raise TrainingFailed(f"{name}: {error}")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Once a core."""
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        """Generation pauses."""
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Returns when the core has received everything. CUDA's handles have no other form than a
        pickle; vLLM's own processes open it."""
        if (handles := update_info.pop("ipc_handles", None)) is not None:
            text = base64.b64encode(pickle.dumps(handles)).decode()
            update_info = {**update_info, "ipc_handles_pickled": text}
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Under the name that the worker gives the version, if no byte was overwritten meanwhile.

        Raises:
            CorruptData: the files were retired while they were sent.
        """
        assert self.manifest is not None
        confirm(self.manifest)
        self._call("finish_weight_update")


def abort(client: Client) -> None:
    """Let go of the communicator, and of who waits in it."""
    if client.trainer is not None:
        client.trainer.shutdown()


class Sender:
    """Serves engines until the process ends."""

    def __init__(self, spec: SenderSpec, device: str = "cuda") -> None:
        """Open the port, and leave its address where only the run's processes read it."""
        self.spec, self.device = spec, device
        self._listener = socket.create_server((own_address(spec.endpoint), 0))
        self._token = secrets.token_hex(16)
        self._sending = threading.Lock()
        """vLLM's packing streams are the process's: two transfers would wait for one another."""
        self._served: dict[int, str] = {}
        self._noting = threading.Lock()
        self._note()
        host, port = self._listener.getsockname()[:2]
        draft = spec.address_file.with_suffix(".tmp")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{host} {port} {self._token}\n")
        draft.replace(spec.address_file)

    def serve(self) -> None:
        """Accept engines for ever."""
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._session, args=(connection,), daemon=True).start()

    def _session(self, connection: socket.socket) -> None:
        """One core, until its connection ends."""
        line = Line(connection)
        client = Client(line)
        try:
            connection.settimeout(_GREETING_S)
            if not hmac.compare_digest(str(line.read(200)["token"]), self._token):
                return
            while True:
                connection.settimeout(None)
                ask = line.read()
                client.manifest = msgspec.convert(ask["manifest"], WeightsManifest)
                connection.settimeout(self.spec.deadline_s + moving_s(client.manifest))
                answer = self._answer(client, ask)
                line.write(answer)
                if answer["done"] and ask["do"] == "send":
                    return  # its communicator is in no known state
        except (OSError, ValueError, KeyError, TypeError, msgspec.ValidationError):
            pass  # the engine is gone, or it is no engine of ours
        finally:
            abort(client)
            self._served.pop(id(client), None)
            self._note()
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread of vLLM's that still reads
            connection.close()

    def _answer(self, client: Client, ask: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked; in `done` why it did not work, or nothing."""
        assert client.manifest is not None
        try:
            if ask["do"] == "verify":
                verify(client.manifest)
                metadata = Files(client.manifest, self.device).metadata()
                return {"done": "", "shapes": {meta.name: meta.shape for meta in metadata}}
            if client.trainer is None:
                source = Files(client.manifest, self.device)
                info = init_info(self.spec, ask["engine_ranks"], source)
                client.trainer = WeightTransferTrainerFactory.trainer_init(
                    info, client=client, source=source
                )
            client.trainer.source.manifest = client.manifest
            with self._turn(client):
                client.trainer.send_weights()
        except (SlipstreamError, RuntimeError, OSError, ValueError) as error:
            return {"done": f"{type(error).__name__}: {error}"}
        self._served[id(client)] = str(client.manifest.version)
        self._note()
        return {"done": ""}

    @contextmanager
    def _turn(self, client: Client) -> Iterator[None]:
        """Inside, nothing is sent to others."""
        while not self._sending.acquire(timeout=_TURN_S):
            client.line.write({"waiting": True})  # for its turn
        try:
            yield
        finally:
            self._sending.release()

    def _note(self) -> None:
        """Tell the learner which version each engine has: it stays until they have the last."""
        with self._noting:
            put_text(self.spec.served_file, json.dumps(list(self._served.values())))


async def main(spec: SenderSpec) -> None:
    """Serve until SIGTERM, or until the learner ends."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def serve() -> None:
        try:
            sender.serve()
        except (
            OSError,
            RuntimeError,
        ) as error:  # no descriptor or thread: the learner starts another
            loop.call_soon_threadsafe(ended.set_exception, error)

    sender, loop = Sender(spec), asyncio.get_running_loop()
    threading.Thread(target=serve, daemon=True).start()
    await ended


if __name__ == "__main__":
    arguments = SenderSpec.model_validate_json(Path(sys.argv[1]).read_text())
    run_process("sender", arguments.run_dir, main(arguments))

"""The learner's ranks: processes that hold a part of every weight, and train a part of every batch.

    rank 0    talks to the buffer service; what it does it tells first     tell("train", batch)
    rank 1..  do the same, in the same order, until told to end            hear() -> "train", batch

They meet at a port of rank 0, on the loopback interface when all are on one machine. What they
tell each other is msgpack and JSON, never a pickle; the ranks of a run trust each other.
"""

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from ..buffer.codec import Frame
from ..buffer.errors import ConfigError, PeerLost
from ..buffer.filesystem import put_text
from ..buffer.waits import PEERS, waiting

LOOPBACK = "127.0.0.1"
MEET_S = 300.0
"""As long as the doctor gives a process to start: importing torch on a busy machine is slow."""
NO_DEADLINE = timedelta(days=7)
"""Of collectives: a rank that dies closes its connections, one that hangs the doctor finds."""
GRAPHS = 64
"""Of a compiled layer, at most; a dozen are met."""
TCPStore = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
_SIOCGIFADDR = 0x8915
_GONE = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "store")


class Ranks:
    """One rank's connection to the others; alone, everything is answered here."""

    mesh: DeviceMesh | None = None
    _control: Any = None
    _saving: Any = None
    """A group of its own: a checkpoint is written beside training, in another thread."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        """Alone when `size` is 1; else `join` makes one."""
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.leading = False
        """Whether what is done is told to the others: on rank 0, once all are prepared."""

    @classmethod
    def join(
        cls, rank: int, size: int, meeting: Path, endpoint: str, device: str = "cpu"
    ) -> "Ranks":
        """Meet the others; returns when all are there.

        Args:
            rank: 0 to size - 1; 0 opens the port.
            size: how many there are.
            meeting: a file that only this run's processes can write; rank 0 leaves the address.
            endpoint: of the buffer service: how far from here the others may be; empty: they are
                all on this machine, wherever the service listens.
            device: `cpu` (gloo) or `cuda` (nccl): one device a rank, in order on each machine.
        Raises:
            ConfigError: there is no such device.
            PeerLost: they did not all come.
        """
        if device == "cuda":
            device = _cuda_device(rank)
        ranks = cls(rank, size, device)
        if size == 1:
            return ranks
        address = own_address(endpoint)
        os.environ["GLOO_SOCKET_IFNAME"] = _interface(address)
        with ranks.watched():
            store = _open_store(size, address, meeting) if rank == 0 else _find_store(size, meeting)
            dist.init_process_group(
                "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
                store=store, rank=rank, world_size=size, timeout=NO_DEADLINE,
            )  # fmt: skip
            ranks.mesh = init_device_mesh(ranks.device.type, (size,))
            ranks._control = dist.new_group(backend="gloo", timeout=NO_DEADLINE)
            ranks._saving = dist.new_group(backend="gloo", timeout=NO_DEADLINE)
        return ranks

    @property
    def name(self) -> str:
        """Of this rank's process."""
        return process_name(self.rank)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def tell(self, what: str, frames: Sequence[Frame] = ()) -> None:
        """Have the other ranks do what this one is about to do."""
        if not self.leading:
            return
        head = msgspec.msgpack.encode((what, [memoryview(frame).nbytes for frame in frames]))
        sizes = torch.tensor([len(head), sum(memoryview(f).nbytes for f in frames)])
        with self._together():
            dist.broadcast(sizes, 0, group=self._control)
            dist.broadcast(_as_tensor(b"".join([head, *frames])), 0, group=self._control)

    def hear(self) -> tuple[str, list[Frame]]:
        """Wait for what rank 0 does next.

        Raises:
            PeerLost: it is gone.
        """
        sizes = torch.zeros(2, dtype=torch.int64)
        idle = waiting(self.name, "what learner rank 0 does next", NO_DEADLINE.total_seconds())
        with idle, self.watched():
            dist.broadcast(sizes, 0, group=self._control)
            num_head, num_body = sizes.tolist()
            message = torch.empty(num_head + num_body, dtype=torch.uint8)
            dist.broadcast(message, 0, group=self._control)
        bytes_ = message.numpy().data
        what, lengths = msgspec.msgpack.decode(bytes_[:num_head], type=tuple[str, list[int]])
        frames: list[Frame] = []
        for length in lengths:
            frames.append(bytes_[num_head : num_head + length])
            num_head += length
        return what, frames

    def exchange(self, value: Any, *, saving: bool = False) -> list[Any]:
        """Every rank's value, by rank; plain JSON. `saving`: from the thread that saves."""
        if self.size == 1:
            return [value]
        group = self._saving if saving else self._control
        mine = _as_tensor(json.dumps(value).encode())
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.watched() if saving else self._together():
            dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
            room = torch.zeros(int(max(sizes)), dtype=torch.uint8)
            room[: len(mine)] = mine
            rooms = [torch.empty_like(room) for _ in range(self.size)]
            dist.all_gather(rooms, room, group=group)
        texts = [r[: int(n)].numpy().tobytes() for r, n in zip(rooms, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        with self._together():
            dist.all_reduce(sums, group=self._control)
        return sums.tolist()

    def any(self, mine: bool) -> bool:
        """Whether it holds on any rank; all get the same answer."""
        return self.total([mine])[0] > 0

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """`watched`, and known to the doctor as a wait for the others."""
        with waiting(self.name, PEERS), self.watched():
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Call what torch says of a rank that is gone by our name for it.

        Raises:
            PeerLost: another rank is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and any(word in str(error) for word in _GONE):
                text = str(error).strip().splitlines()[0]
                raise PeerLost(f"learner rank {self.rank} lost another rank: {text}") from error
            raise


ALONE = Ranks()


def process_name(rank: int) -> str:
    """Of a learner's process, as the supervisor knows it."""
    return f"learner-{rank}" if rank else "learner"


def shard(model: PreTrainedModel, ranks: Ranks) -> None:
    """Leave each rank its part of every parameter, in place; alone, all of them.

    Layers are gathered one at a time; embedding, norm and head together, from the forward pass to
    its backward. Gradients are summed over the ranks, in float32 at least: whoever computes a loss
    divides by what counts on all of them.
    """
    if ranks.mesh is None:
        model.to(ranks.device)  # pyright: ignore
        return
    precise = torch.promote_types(model.dtype, torch.float32)
    settings: dict[str, Any] = {
        "mesh": ranks.mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=precise)
    }  # fmt: skip
    for layer in decoder_layers(model):
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.gathered = lambda work: work()  # pyright: ignore
    register_fsdp_forward_method(model, "gathered")


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the forward pass of each layer, in place, before `shard`: its hooks stay outside.

    A graph break is an error, so that a layer is one graph or is not compiled at all. All layers
    share their graphs, but with and without a gradient, of the input too, a mask, or several rows
    they are others: more than torch allows by itself, which would end a run in the middle.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend=backend)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules there is."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def _cuda_device(rank: int) -> str:
    """A launcher that gives each process devices of its own shows it these alone."""
    if not torch.cuda.is_available():
        raise ConfigError(
            'learner.device = "cuda", but torch finds no CUDA device here; use "cpu", or install '
            "torch for CUDA"
        )
    name = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(name)
    return name


def own_address(endpoint: str) -> str:
    """The address under which this machine is reached by those who share a buffer service."""
    where = urlsplit(endpoint)
    if where.scheme != "tcp" or where.hostname is None:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((where.hostname, where.port or 1))  # sends nothing: asks for the route
        return probe.getsockname()[0]


def _interface(address: str) -> str:
    """The network interface that has an address: what gloo listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return "lo0" if address == LOOPBACK else ""  # macOS, which has another ioctl


def _open_store(size: int, address: str, meeting: Path) -> Any:
    """Rank 0's: listens on this address alone, and leaves it in the file."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        address, port, size, is_master=True, wait_for_workers=False,
        timeout=timedelta(seconds=MEET_S), master_listen_fd=listener.detach(),
    )  # fmt: skip
    put_text(meeting, f"{address} {port}\n")
    return store


def _find_store(size: int, meeting: Path) -> Any:
    end = time.monotonic() + MEET_S
    while not meeting.is_file():
        if time.monotonic() > end:
            raise PeerLost(f"learner rank 0 did not come to {meeting} within {MEET_S:.0f} s")
        time.sleep(0.05)
    address, port = meeting.read_text().split()
    return TCPStore(
        address, int(port), size, wait_for_workers=False, timeout=timedelta(seconds=MEET_S)
    )


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)

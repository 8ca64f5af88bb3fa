# pyright: reportMissingImports=false
"""On a machine without GPU: gloo in the place of vLLM's NCCL communicator, a shared file in that of
device memory that CUDA shares, and streams that do nothing. vLLM's processes load it as a plugin
when this folder is on their path.

`python -m nccl_standin SPEC` is `slipstream.learner.vllm_sender` with it. While the file that
`STANDIN_HOLD` names exists, it sends nothing, and says so in `STANDIN_HOLD`.held.
"""

import contextlib
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

GIVE_UP_S = 20.0
FILES = {}
"""Of memory to share, by its address: path and size."""


def hold(until=lambda: False):
    """Send nothing while it is asked for."""
    asked = Path(os.environ.get("STANDIN_HOLD", "/nonexistent"))
    if asked.exists():
        asked.with_suffix(".held").touch()
        while asked.exists() and not until():
            time.sleep(0.01)


class Communicator:
    """`PyNcclCommunicator`, as far as weight transfer knows it."""

    def __init__(self, group, device, library_path=None):
        self.device, self.rank = torch.device("cpu"), group.rank
        store = PrefixStore("standin", group.store)
        timeout = timedelta(seconds=GIVE_UP_S)
        self._gloo = ProcessGroupGloo(store, group.rank, group.world_size, timeout)
        self.disabled = False

    def broadcast(self, tensor, src, stream=None):
        if self.rank == src:
            hold(until=lambda: self.disabled)
        if self.disabled:
            return  # as vLLM's own does
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._gloo.broadcast([tensor], options).wait()  # pyright: ignore[reportAttributeAccessIssue]

    def destroy(self):
        self.disabled = True


class Stream:
    """A CUDA stream whose work is always done."""

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self):
        pass


class DeviceMemory:
    """`torch`, to whom asks for memory of the device: the sender's, which it may share, is a
    file's."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, size, *, dtype, device):
        if not size or "STANDIN_HOLD" not in os.environ:
            return torch.empty(size, dtype=dtype, device=device)
        folder = Path(os.environ["STANDIN_HOLD"]).parent
        with tempfile.NamedTemporaryFile(dir=folder, prefix="device-", delete=False) as file:
            file.truncate(size)
        made = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        FILES[made.data_ptr()] = file.name, size
        return made


def export(tensor):
    """`reduce_tensor`: how another process finds the memory; number 6 is the device there."""
    hold()
    return rebuild, (*FILES[tensor.data_ptr()], None, None, None, None, 0)


def rebuild(path, size, *_):
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def register():
    from torch.multiprocessing import reductions
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    packed_tensor.torch = DeviceMemory()
    packed_tensor.reduce_tensor = export
    reductions.rebuild_cuda_tensor = rebuild
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(uuid="GPU-standin")
    torch.cuda.ipc_collect = lambda: None
    pynccl.PyNcclCommunicator = Communicator
    torch.cuda.Stream = Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_stream = lambda device=None: Stream()
    torch.accelerator.current_device_index = lambda: 0


if __name__ == "__main__":
    register()
    from slipstream.learner.config import SenderSpec
    from slipstream.learner.vllm_sender import Sender

    Sender(SenderSpec.model_validate_json(Path(sys.argv[1]).read_text()), device="cpu").serve()

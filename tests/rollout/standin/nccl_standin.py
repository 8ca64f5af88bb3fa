# pyright: reportMissingImports=false
"""On a machine without GPU: gloo in the place of vLLM's NCCL communicator, and streams that do
nothing. vLLM's processes load it as a plugin when this folder is on their path.

`python -m nccl_standin SPEC` is `slipstream.learner.vllm_sender` with it. While the file that
`STANDIN_HOLD` names exists, it sends nothing, and says so in `STANDIN_HOLD`.held.
"""

import contextlib
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

GIVE_UP_S = 20.0


class Communicator:
    """`PyNcclCommunicator`, as far as weight transfer knows it."""

    def __init__(self, group, device, library_path=None):
        self.device, self.rank = torch.device("cpu"), group.rank
        store = PrefixStore("standin", group.store)
        timeout = timedelta(seconds=GIVE_UP_S)
        self._gloo = ProcessGroupGloo(store, group.rank, group.world_size, timeout)
        self.disabled = False

    def broadcast(self, tensor, src, stream=None):
        hold = Path(os.environ.get("STANDIN_HOLD", "/nonexistent"))
        if self.rank == src and hold.exists():
            hold.with_suffix(".held").touch()
            while hold.exists() and not self.disabled:
                time.sleep(0.01)
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


def register():
    from vllm.distributed.device_communicators import pynccl

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

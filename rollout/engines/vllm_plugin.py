"""What vLLM loads into its own processes: weights from our mailbox files, and an end with ours.

An entry point of `vllm.general_plugins`, so that it is there in the engine core and in each of its
tensor-parallel workers. Imported by vLLM only.
"""

# pyright: reportMissingImports=false

import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from ...buffer.errors import CorruptData
from ...kernels.adapters import merged
from ...kernels.models import read_weights
from .vllm_heads import widen_heads

BACKEND = "slipstream"


def register() -> None:
    """Offer the backend, and end this process when the one that started it ends; vLLM may call it
    several times in a process."""
    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, MailboxTransfer)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """vLLM's core outlives a killed parent, and would keep its memory for ever."""
    parent.join()
    os._exit(1)


@dataclass
class MailboxInit(WeightTransferInitInfo):
    """There is nothing to agree on: files name themselves."""


@dataclass
class MailboxUpdate(WeightTransferUpdateInfo):
    """One version's shards, an adapter's base among them."""

    files: list[dict[str, str | int]]
    """`file_identity` of each, taken when its digest was verified."""
    head_dims: list[int]
    """[published, computed]; see `vllm_heads`."""


def file_identity(path: Path) -> dict[str, str | int]:
    """What changes when a file is written or replaced."""
    told = path.stat()
    return {"path": str(path), "bytes": told.st_size, "inode": told.st_ino, "at": told.st_mtime_ns}


def check_same(files: Sequence[Mapping[str, str | int]]) -> None:
    """See that files are still those that were verified.

    Raises:
        CorruptData: somebody wrote to one, or removed it.
    """
    for file in files:
        path = Path(str(file["path"]))
        if not path.exists() or file_identity(path) != file:
            raise CorruptData(f"weights {path} have changed since they were verified")


class MailboxTransfer(WeightTransferEngine[MailboxInit, MailboxUpdate]):
    """Maps the files that our process verified by digest, and loads them layer by layer.

    The digests are compared before generation pauses, outside this process; here it is enough that
    the files are still the same ones, so the pause holds no second reading.
    """

    init_info_cls = MailboxInit
    update_info_cls = MailboxUpdate

    def init_transfer_engine(self, init_info: MailboxInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Prepare the layers; from here to `finish_weight_update` the model is neither version."""
        self._names = {name for name, _ in self.model.named_parameters()}  # tied ones once
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: MailboxUpdate) -> None:
        """Load all tensors of one version.

        Raises:
            CorruptData: a file is not the one that was verified.
            ValueError: a parameter got no weights.
        """
        check_same(update_info.files)
        tensors = read_weights([str(file["path"]) for file in update_info.files])
        old, new = update_info.head_dims
        loaded = self.model.load_weights(widen_heads(merged(tensors), old, new))
        if missing := self._names - set(loaded):
            raise ValueError(f"no weights for {sorted(missing)[:3]}")

    def finish_weight_update(self) -> None:
        """Put what was loaded in the places that the kernels read.

        On processors a head holds a packed copy of its weights, which vLLM's reload makes anew only
        for heads that have weights of their own: of a tied one it would stay the old version's.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        for name, module in self.model.named_modules():
            if isinstance(module, ParallelLMHead) and f"{name}.weight" not in self._names:
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held."""

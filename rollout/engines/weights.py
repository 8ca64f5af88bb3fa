"""Published weights from the mailbox's files, verified before anything uses them."""

from collections.abc import Mapping

from torch import Tensor

from ...buffer.errors import CorruptData
from ...buffer.mailbox import verify
from ...buffer.records import WeightsManifest
from ...kernels.models import ModelError, read_weights


def read_verified(manifest: WeightsManifest) -> Mapping[str, Tensor]:
    """The tensors of a manifest by name, memory-mapped.

    Raises:
        CorruptData: a shard is missing, or its size, digest or contents are not what was published.
    """
    verify(manifest)
    try:
        return read_weights([shard.path for shard in manifest.shards])
    except ModelError as error:
        raise CorruptData(f"weights of version {manifest.version}: {error}") from error

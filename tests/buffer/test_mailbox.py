"""Weights: digested when written, verified when read, deleted when nobody can want them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from slipstream.buffer.errors import CorruptData, DiskFull, Refused
from slipstream.buffer.mailbox import (
    Mailbox,
    check_present,
    confirm,
    file_digest,
    publish_file,
    verify,
)
from slipstream.buffer.records import Shard, WeightsManifest
from slipstream.buffer.weight_files import (
    PIECE_BYTES,
    Outbox,
    Piece,
    digest_file,
    tensors_digest,
)

from .make import version


def publish(directory: Path, step: int) -> WeightsManifest:
    """A version whose weights name it."""
    return publish_file(directory, version(step), lambda path: path.write_bytes(b"%d" % step * 99))


def test_published_weights_verify_and_damaged_ones_do_not(tmp_path: Path) -> None:
    manifest = publish(tmp_path, 7)
    verify(manifest)
    check_present(manifest)
    path = Path(manifest.shards[0].path)
    path.write_bytes(b"8" + path.read_bytes()[1:])
    with pytest.raises(CorruptData, match=r"weights 0\.7: .*weights-0\.7\.safetensors"):
        verify(manifest)
    path.write_bytes(b"short")
    with pytest.raises(Refused, match="missing or incomplete"):
        check_present(manifest)
    path.unlink()
    with pytest.raises(CorruptData, match="does not exist"):
        verify(manifest)


def test_the_two_newest_versions_and_the_pinned_ones_are_kept(tmp_path: Path) -> None:
    mailbox = Mailbox()
    for step in range(5):
        mailbox.add(publish(tmp_path, step))
        if step == 1:
            mailbox.pin("evaluation", version(1))
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [*(f"weights-0.{step}.safetensors" for step in (1, 3, 4)), "weights.spare"]
    assert mailbox.held == (version(1), version(3), version(4))
    assert mailbox.find(version(1)).version == version(1)
    mailbox.unpin("evaluation")
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(Refused, match=r"0\.1 is not held \(any more\); held: 0\.3, 0\.4"):
        mailbox.find(version(1))


def test_only_weights_are_ever_touched(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    mailbox = Mailbox()
    shard = Shard(path=str(precious), num_bytes=13, digest="")
    mailbox.add(WeightsManifest(version=version(0), shards=(shard,)))
    for step in (1, 2, 3):
        mailbox.add(publish(tmp_path, step))
    (tmp_path / "weights-0.4.held").write_bytes(b"of a learner that was killed")
    Outbox(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def weights(step: int) -> dict[str, Piece]:
    """Two tensors that name their version; the second is longer than what is copied at once."""
    long = np.full(PIECE_BYTES // 4 + 3, step, np.float32)
    return {
        "a": Piece("F32", (2, 3), np.arange(6, dtype=np.float32).view(np.uint8)),
        "b": Piece("F32", long.shape, long.view(np.uint8)),
    }


def test_what_is_published_is_a_safetensors_file_of_those_tensors(tmp_path: Path) -> None:
    manifest = Outbox(tmp_path).publish(version(3), weights(3))
    verify(manifest)
    found = load_file(manifest.shards[0].path)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].shape == weights(3)["b"].shape
    assert (found["b"] == 3).all()


def test_a_file_has_one_digest_and_what_it_holds_another_in_whatever_order(tmp_path: Path) -> None:
    outbox, pieces, paths = Outbox(tmp_path), weights(3), [tmp_path / f"{n}.held" for n in "abc"]
    reordered = dict(reversed(pieces.items()))
    renamed = {"a": pieces["a"], "c": pieces["b"]}
    found = [
        outbox.write(path, each)
        for path, each in zip(paths, (pieces, reordered, renamed), strict=True)
    ]
    assert [digest_file(path) for path in paths] == found
    assert [each.file for each in found] == [file_digest(path)[1] for path in paths]
    assert len({each.file for each in found}) == 3
    assert found[0].tensors == found[1].tensors == tensors_digest(pieces) != found[2].tensors


def test_pages_are_used_again_and_no_path_ever_shows_other_bytes(tmp_path: Path) -> None:
    outbox, mailbox, inodes = Outbox(tmp_path), Mailbox(), []
    manifests = []
    for step in range(8):
        manifests.append(outbox.publish(version(step), weights(step)))
        mailbox.add(manifests[-1])
        inodes.append(Path(manifests[-1].shards[0].path).stat().st_ino)
        outbox.keep(mailbox.held)
        for manifest in manifests[-2:]:
            verify(manifest)
            confirm(manifest)
        for manifest in manifests[:-2]:
            with pytest.raises(CorruptData, match="retired while read"):
                confirm(manifest)
    assert len(set(inodes)) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_without_reuse_no_spare_is_left_whoever_retired_it(tmp_path: Path) -> None:
    outbox, mailbox = Outbox(tmp_path, reuse=False), Mailbox()
    for step in range(4):
        mailbox.add(outbox.publish(version(step), weights(step)))
        outbox.keep(mailbox.held)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"weights-0.{step}.safetensors" for step in (2, 3)
    }


def test_other_sizes_and_a_service_that_sees_no_files_leave_nothing_behind(tmp_path: Path) -> None:
    outbox, held = Outbox(tmp_path), []
    for step in range(6):
        held = [*held[-1:], version(step)]
        manifest = outbox.publish(version(step), {"a": weights(step)["ab"[step % 2]]})
        outbox.keep(held)
        verify(manifest)
    assert len(list(tmp_path.iterdir())) == 3


def test_weights_that_do_not_fit_end_the_run_with_a_reason(tmp_path: Path) -> None:
    huge = np.broadcast_to(np.uint8(0), 1 << 60)
    with pytest.raises((DiskFull, ValueError, MemoryError), match=r"weights\.partial cannot grow"):
        Outbox(tmp_path).publish(version(0), {"a": Piece("U8", huge.shape, huge)})

"""Weights: digested when written, verified when read, deleted when nobody can want them."""

from pathlib import Path

import pytest
from slipstream.buffer.errors import CorruptData, Refused
from slipstream.buffer.mailbox import Mailbox, check_present, publish_file, verify
from slipstream.buffer.records import Shard, WeightsManifest

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
    assert kept == [f"weights-0.{step}.safetensors" for step in (1, 3, 4)]
    assert mailbox.find(version(1)).version == version(1)
    mailbox.unpin("evaluation")
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(Refused, match=r"0\.1 is not held \(any more\); held: 0\.3, 0\.4"):
        mailbox.find(version(1))


def test_only_weights_are_ever_deleted(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    mailbox = Mailbox()
    shard = Shard(path=str(precious), num_bytes=13, digest="")
    mailbox.add(WeightsManifest(version=version(0), shards=(shard,)))
    for step in (1, 2, 3):
        mailbox.add(publish(tmp_path, step))
    assert precious.exists()

"""Weights between hosts: real sockets, real processes, damaged bytes, killed peers."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from slipstream.buffer.errors import CorruptData, PeerLost
from slipstream.buffer.mailbox import verify
from slipstream.buffer.records import WeightsManifest
from slipstream.buffer.weight_chunks import CHUNK_BYTES, AskSources, Tracker
from slipstream.buffer.weight_fetch import Fetch, Inbox, remove_unused, use
from slipstream.buffer.weight_files import Outbox, Piece
from slipstream.buffer.weight_holder import Holder, own_endpoint

from .make import version

CHUNKS = 6
LOOPBACK = "tcp://127.0.0.1:*"


def pieces(seed: int = 0) -> dict[str, Piece]:
    """One tensor; its file has `CHUNKS` chunks."""
    bytes_N = np.random.default_rng(seed).integers(0, 256, CHUNKS * CHUNK_BYTES - 4096, np.uint8)
    return {"a": Piece("U8", bytes_N.shape, bytes_N)}


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Outbox]:
    outbox = Outbox(tmp_path / "learner", holder=Holder(LOOPBACK))
    yield outbox
    assert outbox.holder is not None
    outbox.holder.close()


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Callable[..., Inbox]]:
    """`inbox("a")`: that of host a."""
    made: list[Inbox] = []

    def make(host: str, deadline_s: float = 20.0) -> Inbox:
        made.append(Inbox(tmp_path / host, LOOPBACK, deadline_s=deadline_s))
        return made[-1]

    yield make
    for each in made:
        each.close()


def sent(outbox: Outbox) -> int:
    assert outbox.holder is not None
    return outbox.holder.sent_bytes


def test_what_arrives_is_what_was_published_and_is_fetched_once_a_host(publisher, inbox):
    manifest = publisher.publish(version(1), pieces())
    here = inbox("a").local(manifest)
    verify(here)
    assert not here.shards[0].holder
    assert here.shards[0].path != manifest.shards[0].path
    assert inbox("a").local(manifest) == here
    assert sent(publisher) == manifest.shards[0].num_bytes


def test_the_base_of_adapters_is_fetched_once(publisher, inbox, tmp_path):
    receiver, written = inbox("a"), tmp_path / "learner" / "base.held"
    publisher.hold_base(written, publisher.write(written, pieces(9)).file)
    adapter, before = {"a": Piece("U8", (999,), np.arange(999).astype(np.uint8))}, 0
    for step in range(1, 8):
        manifest = publisher.publish(version(step), adapter)
        here = receiver.local(manifest)
        verify(here)
        assert {Path(shard.path).parent for shard in here.files} == {tmp_path / "a"}
        base_bytes = here.base.num_bytes if step == 1 else 0
        adapter["a"].bytes_N[step] += 1
        publisher.keep([version(step)])
        assert sent(publisher) - before == base_bytes + here.shards[0].num_bytes
        before = sent(publisher)


def test_a_host_that_has_verified_a_chunk_serves_it_on(publisher, inbox):
    manifest = publisher.publish(version(1), pieces())
    relays = [inbox(host) for host in "abcd"]
    threads = [threading.Thread(target=relay.local, args=(manifest,)) for relay in relays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    late = inbox("e")
    before = sent(publisher)
    verify(late.local(manifest))
    assert sent(publisher) == before <= 2 * manifest.shards[0].num_bytes
    total = sum(relay.holder.sent_bytes for relay in relays) + before
    assert total == 5 * manifest.shards[0].num_bytes


def test_a_receiver_that_lost_its_file_gets_it_again_under_the_same_address(
    publisher, tmp_path: Path
) -> None:
    manifest = publisher.publish(version(1), pieces())
    for _ in range(2):
        receiver = Inbox(tmp_path / "a", f"ipc://{tmp_path}/a.sock")
        verify(receiver.local(manifest))
        receiver.close()
        assert not (tmp_path / "a").exists()


def test_a_corrupt_chunk_of_a_relay_is_refused_and_fetched_elsewhere(publisher, inbox):
    manifest = publisher.publish(version(1), pieces())
    relay, receiver = inbox("a"), inbox("b")
    path = Path(relay.local(manifest).shards[0].path)
    with path.open("r+b") as file:  # a bit that rots after it was verified
        file.seek(2 * CHUNK_BYTES + 17)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    verify(receiver.local(manifest))
    assert receiver.refused == 1
    with pytest.raises(CorruptData, match="digest"):
        verify(relay.local(manifest))


def test_a_publisher_whose_bytes_are_wrong_is_not_believed(publisher, inbox):
    manifest = publisher.publish(version(1), pieces())
    with Path(manifest.shards[0].path).open("r+b") as file:
        file.seek(CHUNK_BYTES)
        file.write(b"x" * 99)
    receiver = inbox("a")
    with pytest.raises(CorruptData, match="chunk 1 was refused 5 times"):
        receiver.local(manifest)
    assert receiver.refused == 5
    assert not list((receiver._folder).glob("*.safetensors"))


def test_a_version_that_was_retired_is_an_error_at_once(publisher, inbox):
    manifest = publisher.publish(version(1), pieces())
    publisher.publish(version(2), pieces(1))
    publisher.keep([version(2)])
    with pytest.raises(CorruptData, match="not offered"):
        inbox("a").local(manifest)


def test_who_does_not_know_the_key_is_not_answered(publisher, inbox):
    manifest = publisher.publish(version(1), pieces())
    endpoint, _, key = manifest.shards[0].holder.partition(" ")
    assert len(key) == 40
    for holder in (endpoint, f"{endpoint} {zmq.curve_keypair()[0].decode()}"):
        shard = msgspec.structs.replace(manifest.shards[0], holder=holder, path="/elsewhere")
        with pytest.raises(PeerLost):
            inbox("a", 0.5).local(WeightsManifest(version=version(1), shards=(shard,)))


PEER = """
import sys, time
from pathlib import Path
import msgspec, numpy as np
from slipstream.buffer.records import Version, WeightsManifest
from slipstream.buffer.weight_fetch import Inbox
from slipstream.buffer.weight_files import Outbox, Piece
from slipstream.buffer.weight_holder import Holder
folder, manifest, num_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if manifest:
    own = Inbox(folder, "tcp://127.0.0.1:*")
    made = own.local(msgspec.json.decode(manifest, type=WeightsManifest))
else:
    bytes_N = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    outbox = Outbox(folder, holder=Holder("tcp://127.0.0.1:*"))
    version = Version(branch=0, step=1)
    made = outbox.publish(version, {"a": Piece("U8", bytes_N.shape, bytes_N)})
print(msgspec.json.encode(made).decode(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def peer() -> Iterator[Callable]:
    """`peer(folder)`: a publisher's process and its manifest; with a manifest: a relay's."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, manifest: WeightsManifest | None = None):
        told = "" if manifest is None else msgspec.json.encode(manifest).decode()
        size = str(CHUNKS * CHUNK_BYTES - 4096)
        command = [sys.executable, "-c", PEER, str(folder), told, size]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        line = started[-1].stdout.readline()
        return started[-1], msgspec.json.decode(line, type=WeightsManifest)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_publisher_killed_halfway_is_an_error_in_time_and_its_chunks_are_not_fetched_again(
    tmp_path, inbox, peer, monkeypatch
):
    process, manifest = peer(tmp_path / "learner")
    receiver, accept, killed_s = inbox("a", 1.5), Fetch._accept, []

    def accept_and_kill(self, *chunk):
        accept(self, *chunk)
        if not killed_s:
            process.kill()
            Path(manifest.shards[0].path).unlink()  # its host is gone
            killed_s.append(time.monotonic())

    monkeypatch.setattr(Fetch, "_accept", accept_and_kill)
    with pytest.raises(PeerLost, match=r"has not answered for 1\.5 s"):
        receiver.local(manifest)
    assert time.monotonic() - killed_s[0] < 1.5 + 0.5
    _, again = peer(tmp_path / "next")
    assert again.shards[0].digest == manifest.shards[0].digest
    verify(receiver.local(again))
    assert 1 <= receiver.resumed < CHUNKS


def test_what_a_publisher_that_has_ended_left_where_we_see_it_is_taken(tmp_path, inbox, peer):
    process, manifest = peer(tmp_path / "learner")
    process.kill()
    process.wait()
    here = inbox("a", 0.3).local(manifest)
    verify(here)
    assert not here.shards[0].holder


def test_a_publisher_knows_when_every_host_that_fetches_from_it_has_its_newest_version(
    publisher, inbox, monkeypatch
):
    assert publisher.receiving == 0
    seen, accept = [], Fetch._accept

    def watched(self, *chunk):
        seen.append(publisher.receiving)
        accept(self, *chunk)

    monkeypatch.setattr(Fetch, "_accept", watched)
    for step in (1, 2):
        manifest = publisher.publish(version(step), pieces(step))
        assert publisher.receiving == step - 1  # who fetched version 1 will want version 2
        inbox("ab"[step - 1]).local(manifest)  # another process of that machine may fetch it
        assert publisher.receiving == 0
    assert seen == [1] * 2 * CHUNKS


def test_a_fetch_goes_on_where_an_earlier_one_was_cut_off(publisher, inbox, tmp_path):
    manifest = publisher.publish(version(1), pieces())
    shard = manifest.shards[0]
    kept = Path(shard.path).read_bytes()[: 3 * CHUNK_BYTES + 5]
    partial = tmp_path / "a" / f"{shard.digest}.partial"
    partial.parent.mkdir()
    partial.write_bytes(kept)
    receiver = inbox("a")
    verify(receiver.local(manifest))
    assert receiver.resumed == 3
    assert sent(publisher) == shard.num_bytes - 3 * CHUNK_BYTES


def test_a_killed_relay_is_done_without(publisher, inbox, peer, tmp_path, monkeypatch):
    monkeypatch.setattr("slipstream.buffer.weight_fetch.RELAY_DEADLINE_S", 1.0)
    manifest = publisher.publish(version(1), pieces())
    process, _ = peer(tmp_path / "a", manifest)
    process.kill()
    process.wait()
    receiver, began_s = inbox("b"), time.monotonic()
    verify(receiver.local(manifest))
    assert receiver.lost >= 1
    assert time.monotonic() - began_s < 10


def report(receiver: str, *verified: int, **changes) -> AskSources:
    fields = {"begins": False, "corrupt": (), "silent": (), "wanted": 1} | changes
    return AskSources(digest="d", receiver=receiver, verified=verified, **fields)


def test_a_publisher_sends_no_chunk_more_than_twice_whatever_the_order():
    tracker, random = Tracker(40), np.random.default_rng(0)
    coming: dict[str, list[int]] = {f"r{n}": [] for n in range(16)}
    have: dict[str, set[int]] = {name: set() for name in coming}
    for turn in range(20_000):
        name = f"r{random.integers(16)}"
        done = [number for number in coming[name] if random.random() < 0.5]
        have[name] |= set(done)
        tracker.heard(report(name, *done), now=turn / 1000)
        left = [number for number in coming[name] if number not in done]
        coming[name] = left + [number for number, _ in tracker.assign(name, 4 - len(left))]
    assert all(len(own) == 40 for own in have.values())
    assert max(tracker.copies) <= 2
    assert sum(tracker.copies) <= 1.5 * 40


def test_what_was_given_to_a_receiver_that_died_is_given_again():
    tracker = Tracker(1)
    tracker.heard(report("a"), now=0.0)
    assert tracker.assign("a", 1) == [(0, "")]
    tracker.heard(report("b"), now=1.0)
    assert tracker.assign("b", 1) == [(0, "")]
    tracker.heard(report("c"), now=2.0)
    assert tracker.assign("c", 1) == []
    tracker.heard(report("c"), now=60.0)
    assert tracker.assign("c", 1) == [(0, "")]


def test_a_silent_relay_is_named_to_nobody():
    tracker = Tracker(2)
    tracker.heard(report("a", 0, 1), now=0.0)
    tracker.heard(report("b"), now=0.0)
    assert sorted(tracker.assign("b", 2)) == [(0, "a"), (1, "a")]
    tracker.heard(report("b", silent=("a",)), now=0.0)
    assert sorted(tracker.assign("b", 2)) == [(0, ""), (1, "")]


def test_a_folder_is_removed_when_its_last_user_has_ended(tmp_path):
    folder = tmp_path / "run"
    first, second = use(folder), use(folder)
    first.close()
    remove_unused(folder)
    assert folder.exists()
    second.close()
    remove_unused(folder)
    assert not folder.exists()


def test_a_process_serves_beside_the_buffer_or_on_the_address_that_faces_it():
    assert own_endpoint("ipc:///tmp/x/buffer", "worker-0") == "ipc:///tmp/x/worker-0"
    assert own_endpoint("tcp://127.0.0.1:4242", "worker-0") == "tcp://127.0.0.1:*"

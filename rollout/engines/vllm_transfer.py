"""New weights by vLLM's own backends: the learner's sender drives, this side has its core follow.

    prepare(v)   -> verify v      the sender compares digests; generation goes on
    put(v)       -> send v        `waiting` every second, while others are sent to; then what
                                  vLLM's trainer engine calls, see `steps`
                 <- done

The wire is described in `learner/vllm_sender.py`.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ...buffer.errors import CorruptData, PeerLost
from ...buffer.mailbox import moving_s
from ...buffer.records import WeightsManifest

Steps = Mapping[str, Callable[[Any], Awaitable[object]]]
"""What the sender may call, by vLLM's names."""

_LINE_BYTES = 2**26
_RETRY_S = 0.2


class Transfer:
    """The connection of one core to the learner's sender."""

    def __init__(self, address_file: Path, engine_ranks: int, timeout_s: float) -> None:
        """Nothing is opened before the first weights.

        Args:
            address_file: where the sender leaves its address.
            engine_ranks: of the core.
            timeout_s: how long to look for the sender.
        """
        self._file, self._ranks, self._timeout_s = address_file, engine_ranks, timeout_s
        self._line: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.heard_s = 0.0
        """When the sender last said something; on the monotonic clock."""

    async def prepare(self, manifest: WeightsManifest) -> dict[str, list[int]]:
        """Have the sender compare the digests; the shape of each weight.

        Raises:
            CorruptData: they differ, or the version is retired.
            PeerLost: there is no sender, or it does not answer in time.
        """
        timeout_s = 2 * self._timeout_s + moving_s(manifest)
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    said = await self._ask("verify", manifest, {})
                except PeerLost:  # since the last version; the learner starts another
                    said = await self._ask("verify", manifest, {})
        except TimeoutError:
            self.close()
            raise PeerLost(
                f"the process that sends weights has not verified {manifest.version} within "
                f"{timeout_s:.0f} s; see the learner's log"
            ) from None
        if said["done"]:
            raise CorruptData(said["done"])
        return said["shapes"]

    async def put(self, manifest: WeightsManifest, steps: Steps) -> None:
        """Have the sender put a version into the core.

        Raises:
            RuntimeError: it did not work; the core may be half-updated.
            PeerLost: the sender is gone; likewise.
        """
        said = await self._ask("send", manifest, steps)
        if said["done"]:
            raise RuntimeError(said["done"])

    def close(self) -> None:
        """End the connection, with it the sender's communicator."""
        if self._line is not None:
            self._line[1].close()
            self._line = None

    async def _ask(self, what: str, manifest: WeightsManifest, steps: Steps) -> dict[str, Any]:
        reader, writer = self._line = self._line or await self._connected()
        told = {"do": what, "manifest": msgspec.to_builtins(manifest), "engine_ranks": self._ranks}
        while True:
            try:
                if told:
                    writer.write(json.dumps(told).encode() + b"\n")
                    await writer.drain()
                line = await reader.readline()
            except OSError:
                line = b""
            if not line:
                self.close()
                raise PeerLost("the process that sends weights ended; see the learner's log")
            said, self.heard_s = json.loads(line), time.monotonic()
            if "done" in said:
                return said
            if "waiting" in said:
                told = {}
                continue
            told = {"error": ""}
            try:
                await steps[said["call"]](said["argument"])
            except Exception as error:  # whatever it is, the sender must not wait for more
                told = {"error": repr(error)}

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Find the sender: it starts with the first version, and anew after it ended."""
        end_s = time.monotonic() + self._timeout_s
        while time.monotonic() < end_s:
            with suppress(OSError, ValueError):
                host, port, token = self._file.read_text().split()
                line = await asyncio.open_connection(host, int(port), limit=_LINE_BYTES)
                line[1].write(json.dumps({"token": token}).encode() + b"\n")
                return line
            await asyncio.sleep(_RETRY_S)
        raise PeerLost(
            f"no process that sends weights is at {self._file} after {self._timeout_s:.0f} s; "
            "see the learner's log"
        )

"""Asks the buffer how it is, in a thread of its own, so that displays never wait for the answer."""

import asyncio
import threading
import time

from ..buffer.client import BufferClient
from ..buffer.errors import SlipstreamError
from ..buffer.messages import Stats

PATIENCE_S = 3.0
"""For the service to hear that the run closes, and for the thread to end."""
NEWS_S = 5.0
"""For how long it is of use to say that a process was lost: its successor says it, too."""


class Observer:
    """The supervisor's connection to the buffer service.

    Trace:
        observer.start()               # latest is None until the service answers
        observer.latest                # -> Stats, at most `every_s` old while it lives
        observer.close_run("finished") # no more claims
        observer.stop()
    """

    def __init__(self, endpoint: str, run_id: str, every_s: float = 0.5) -> None:
        """Prepare; nothing is sent yet.

        Args:
            endpoint: where the service listens.
            run_id: which run it must be.
            every_s: seconds between two questions.
        """
        self.latest: Stats | None = None
        """The newest answer."""
        self._client = BufferClient(endpoint, run_id, "supervisor", timeout_s=5)
        self._every_s = every_s
        self._closing_reason = ""
        self._lost: dict[str, float] = {}
        """name -> when it was lost, until the service knows."""
        self._wake, self._told, self._stopped = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._ask()), name="observer", daemon=True
        )

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def close_run(self, reason: str) -> None:
        """Tell the service that no more claims are granted; gives up when it does not answer, as
        the children are ended anyway."""
        self._closing_reason = reason
        self._wake.set()
        if self.latest is not None and self._thread.is_alive():
            self._told.wait(PATIENCE_S)

    def lost(self, name: str) -> None:
        """Have the service issue again at once what a process held that went with its node."""
        self._lost[name] = time.monotonic()
        self._wake.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE_S)

    async def _ask(self) -> None:
        connected = False
        try:
            while not self._stopped.is_set():
                try:
                    if not connected:
                        await self._client.connect()
                        connected = True
                    await self._turn()
                except SlipstreamError:
                    pass  # not up yet, or down: the supervisor sees the process itself
                await asyncio.to_thread(self._wake.wait, self._every_s)
                self._wake.clear()
        finally:
            await self._client.close()

    async def _turn(self) -> None:
        if self._closing_reason and not self._told.is_set():
            await self._client.close_run(self._closing_reason)
            self._told.set()
        for name, since_s in list(self._lost.items()):
            if time.monotonic() - since_s < NEWS_S:
                await self._client.lost(name)
            del self._lost[name]
        self.latest = await self._client.stats()

"""Asks the buffer how it is, in a thread of its own, so that displays never wait for the answer."""

import asyncio
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from ..buffer.client import BufferClient
from ..buffer.errors import SlipstreamError
from ..buffer.messages import Stats

CLOSE_PATIENCE_S = 3.0


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
        self._endpoint = endpoint
        self._run_id = run_id
        self._every_s = every_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="observer", daemon=True)
        self._client: BufferClient | None = None
        self._task: asyncio.Task[None] | None = None
        self.latest: Stats | None = None
        """The newest answer."""

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def close_run(self, reason: str) -> None:
        """Tell the service that no more claims are granted; gives up when it does not answer."""
        if self._client is None or not self._thread.is_alive():
            return
        future: Future[object] = asyncio.run_coroutine_threadsafe(
            self._close(self._client, reason), self._loop
        )
        try:
            future.result(timeout=CLOSE_PATIENCE_S)
        except (SlipstreamError, FutureTimeout):
            future.cancel()  # the service is gone or busy; the children are ended anyway

    def stop(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join(timeout=CLOSE_PATIENCE_S)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    @staticmethod
    async def _close(client: BufferClient, reason: str) -> None:
        await client.close_run(reason)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._ask())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    async def _ask(self) -> None:
        client = BufferClient(self._endpoint, self._run_id, "supervisor", timeout_s=5)
        try:
            while True:
                await self._ask_once(client)
                await asyncio.sleep(self._every_s)
        finally:
            await client.close()

    async def _ask_once(self, client: BufferClient) -> None:
        try:
            if self._client is None:
                await client.connect()
                self._client = client
            self.latest = await client.stats()
        except SlipstreamError:
            # Not up yet, or down: the supervisor sees the process itself, this is only display.
            return

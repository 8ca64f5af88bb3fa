"""One process on another node: an actor holds it there, a `RayChild` stands for it here.

An actor is a hand on another node: it starts the very process that the local launcher would, with
the devices Ray gave it, and passes signals and the exit code on. So a frozen process can still be
signalled, its stacks dumped and itself restarted, and only specs of ours travel through Ray.
"""

import os
import platform
import signal
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from ..buffer.errors import SlipstreamError
from .child import Child
from .scratch import host_dir, sweep

ANSWER_S = 30.0
"""An actor that does not answer for so long is lost with its node."""
ALIKE = ("slipstream", "torch", "transformers", "ray")
"""Packages whose versions must be equal on all nodes."""


def versions() -> dict[str, str]:
    """Of Python and of what must be alike."""
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in ALIKE}}


class ProcessActor:
    """Holds one process on its node."""

    def facts(self, run_dir: str) -> dict[str, Any]:
        """What this node has: host, versions, devices, whether it sees the run folder."""
        return {
            "host": platform.node(),
            "address": get_node_ip_address(),
            "node": ray.get_runtime_context().get_node_id(),
            "versions": versions(),
            "devices": [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d],
            "sees": (Path(run_dir) / "run.json").is_file(),
        }

    def start(self, name: str, argv: list[str], run_dir: str, threads: int, extra: Any) -> int:
        """Start the process; its pid."""
        self._child = Child(
            name, argv, run_dir=Path(run_dir), threads=threads, environment=dict(extra)
        )
        return self._child.pid

    def ended(self) -> int:
        """Wait for the process's end; its exit code."""
        while (code := self._child.poll()) is None:
            time.sleep(0.05)
        sweep(host_dir("", "").parent)
        return code

    def send(self, number: int) -> bool:
        """Signal the process."""
        return self._child.send(signal.Signals(number))

    def kill(self) -> None:
        """End it and everything it started."""
        self._child.kill()


class RayChild(Child):
    """A `Child` on another node; its files are in the run folder, which all nodes see.

    placed()        False until Ray found a place: a node was lost, another may come
    poll()          None while it waits for its place, and while it runs
    """

    def __init__(self, name: str, run_dir: Path, actor: Any, start: tuple[Any, ...]) -> None:
        """Have an actor, placed or not, start the process.

        Args:
            name: see `Child`.
            run_dir: see `Child`.
            actor: a `ProcessActor`.
            start: the arguments of its `start`.
        """
        self._describe(name, run_dir)
        self._actor = actor
        self._started = actor.start.remote(name, *start)
        self._end: Any = None

    def placed(self) -> bool:
        """Whether its actor has started the process; raises `RayError` when it cannot."""
        if self._end is None and ray.wait([self._started], timeout=0)[0]:
            self.pid = int(ray.get(self._started))
            self._end = self._actor.ended.remote()
        return self._end is not None

    def poll(self) -> int | None:
        """As `Child.poll`; a lost node is a killed process."""
        if self._exit_code is None:
            try:
                if self.placed() and ray.wait([self._end], timeout=0)[0]:
                    self._exit_code = int(ray.get(self._end))
            except RayError:
                self._exit_code = -signal.SIGKILL
            if self._exit_code is not None:
                ray.kill(self._actor)
        return self._exit_code

    def send(self, number: signal.Signals) -> bool:
        """As `Child.send`; what has no place yet has nothing to end."""
        if self.poll() is not None or not self.placed():
            self._give_up()
            return False
        with suppress(SlipstreamError):
            return bool(answer(self._actor.send.remote(int(number))))
        return False

    def kill(self) -> None:
        """As `Child.kill`; when the actor does not answer, its own end ends the process."""
        if self.poll() is None and self.placed():
            with suppress(SlipstreamError):
                answer(self._actor.kill.remote())
            self.wait(deadline_s=10.0)
        self._give_up()

    def _give_up(self) -> None:
        if self._exit_code is None:
            self._exit_code = -signal.SIGKILL
            ray.kill(self._actor)


def answer(reference: Any, deadline_s: float = ANSWER_S) -> Any:
    """An actor's answer.

    Raises:
        SlipstreamError: it is gone, or silent.
    """
    try:
        return ray.get(reference, timeout=deadline_s)
    except RayError as error:
        raise SlipstreamError(f"a Ray actor does not answer: {error}") from error

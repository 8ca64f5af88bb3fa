"""One process on another node: an actor holds it there, a `RayChild` stands for it here.

An actor is a hand on another node: it starts the very process that the local launcher would, with
the devices Ray gave it, and passes signals and the exit code on. So a frozen process can still be
signalled, its stacks dumped and itself restarted, and only specs of ours travel through Ray.
"""

import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, RuntimeEnvSetupError
from ray.util import get_node_ip_address

from ..buffer.errors import ConfigError, SlipstreamError
from .child import Child, ProcessError
from .engines import check_engine, version
from .run_dir import read_experiment, read_run
from .scratch import host_dir, sweep

ANSWER_S = 30.0
"""An actor that does not answer for so long is lost with its node."""
PLACE_PATIENCE_S = 15.0
"""A process that has no place for so long says so; on a busy machine an actor takes a while. A node
that could not take part is asked so often whether it can."""
ALIKE = ("slipstream", "torch", "transformers", "ray")
"""Packages whose versions must be equal on all nodes."""


def versions() -> dict[str, str]:
    """Of Python and of what must be alike."""
    return {"python": platform.python_version(), **{n: version(n) or "missing" for n in ALIKE}}


def unfit(facts: dict[str, Any], wanted: dict[str, str], run_dir: str, name: str = "") -> str:
    """Why a node cannot take part in a run, in words; empty when it can.

    Args:
        facts: of `ProcessActor.facts`.
        wanted: the head's `versions`.
        run_dir: the run folder.
        name: of the process; a rollout worker needs the engine.
    """
    differ = {key: found for key, found in facts["versions"].items() if found != wanted[key]}
    if differ:
        return (
            f"node {facts['host']} has {differ}, this one { {key: wanted[key] for key in differ} }"
        )
    if not facts["sees"]:
        return (
            f"node {facts['host']} does not see {run_dir}: put runs_dir (and the model) on a file "
            "system that all nodes share"
        )
    if facts["unseen"]:
        return (
            f"node {facts['host']} does not see {facts['unseen']}: put it on a file system that "
            "all nodes share"
        )
    if facts["engine"] and name.startswith("worker"):
        return f"node {facts['host']}: {facts['engine']}"
    return ""


def unseen(run_dir: Path) -> str:
    """A file that a run needs and this machine cannot read; empty when there is none."""
    experiment = read_experiment(run_dir)
    named = [each.name for each in (experiment.reward, experiment.environment) if each]
    code = [file for file, _, _ in (name.rpartition(":") for name in named) if file[-3:] == ".py"]
    files = [Path(read_run(run_dir).model_dir, "config.json"), *(run_dir / file for file in code)]
    return next((str(file) for file in files if not os.access(file, os.R_OK)), "")


def engine_problem(run_dir: Path) -> str:
    """Why the engine of a run does not work on this machine; empty when it does."""
    try:
        check_engine(read_experiment(run_dir).rollout)
    except ConfigError as error:
        return str(error)
    return ""


def _said(error: RayError) -> str:
    """What Ray says at the end of a page, or the error itself of a task of ours."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


class ProcessActor:
    """Holds one process on its node."""

    def facts(self, run_dir: str) -> dict[str, Any]:
        """What this node has: host, versions, devices, what it sees of the run, and its engine."""
        folder = Path(run_dir)
        sees = (folder / "run.json").is_file()
        return {
            "host": platform.node(),
            "address": get_node_ip_address(),
            "node": ray.get_runtime_context().get_node_id(),
            "versions": versions(),
            "devices": [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d],
            "sees": sees,
            "unseen": unseen(folder) if sees else "",
            "engine": engine_problem(folder) if sees else "",
        }

    def start(
        self,
        name: str,
        argv: list[str],
        run_dir: str,
        threads: int,
        extra: Any,
        wanted: dict[str, str],
    ) -> tuple[int, str, str]:
        """Start the process.

        Returns:
            Its pid, the node it is on, and why it was not started (then the pid is 0): the node,
            which may have joined later, cannot take part.
        """
        facts = self.facts(run_dir)
        if problem := unfit(facts, wanted, run_dir, name):
            return 0, facts["node"], problem
        environment = dict(extra)
        if "PYTHONPATH" in environment:  # what Ray brought to this node is found there, too
            paths = [environment["PYTHONPATH"], os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._child = Child(
            name,
            [sys.executable, *argv[1:]],  # the head's may lie elsewhere
            run_dir=Path(run_dir),
            threads=threads,
            environment=environment,
        )
        return self._child.pid, facts["node"], ""

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
    error()         also what its node said that cannot take part
    poll()          None while it waits for its place, and while it runs
    """

    def __init__(
        self,
        name: str,
        run_dir: Path,
        actor: Any,
        start: tuple[Any, ...],
        *,
        asks: str = "",
        gone: Callable[[], None] = lambda: None,
        patient: bool = False,
        again: Callable[[], Any] | None = None,
    ) -> None:
        """Have an actor, placed or not, start the process.

        Args:
            name: see `Child`.
            run_dir: see `Child`.
            actor: a `ProcessActor`.
            start: the arguments of its `start` but for the name and the versions.
            asks: what its place must have, in words.
            gone: called once when the process has ended.
            patient: on a node that cannot take part it waits until that node can, or is removed;
                otherwise this is its error.
            again: a new actor in the same place, for one that could not even be made there.
        """
        self._describe(name, run_dir)
        self._actor, self._asks, self._gone, self._patient = actor, asks, gone, patient
        self._start, self._again = start, again
        self._made_s = time.monotonic()
        self._ask()
        self._end: Any = None
        self._node, self._refusal = "", ""
        self._error: ProcessError | None = None

    def _ask(self) -> None:
        self._started = self._actor.start.remote(self.name, *self._start, versions())
        self._asked_s = time.monotonic()

    def _retry(self) -> None:
        """Ask once more, an actor that sees what was mended: the last may not even live."""
        if self._again is not None:
            with suppress(RayError):
                ray.kill(self._actor)
            self._actor = self._again()
        self._ask()

    def placed(self) -> bool:
        """Whether its actor has started the process; raises `RayError` when it cannot."""
        if self._end is None and ray.wait([self._started], timeout=0)[0]:
            try:
                self.pid, self._node, self._refusal = ray.get(self._started)
            except RayError as error:
                if not (self._patient and _of_its_node(error)):
                    raise
                self._refusal = _said(error)
            if self.pid:
                self._end = self._actor.ended.remote()
            elif self._patient and time.monotonic() - self._asked_s > PLACE_PATIENCE_S:
                self._retry()
        return self._end is not None

    @property
    def waits_for(self) -> str:
        """A place, once Ray has had time to find one; `poll` tells when it cannot."""
        with suppress(RayError):
            if self._exit_code is not None or self.placed():
                return ""
            if self._refusal:
                return f"its node, which cannot take part: {self._refusal}; mend it, or remove it"
            if time.monotonic() - self._made_s > PLACE_PATIENCE_S:
                return f"room on the Ray cluster ({self._asks}): add a node"
        return ""

    def poll(self) -> int | None:
        """As `Child.poll`; a lost node is a killed process."""
        if self._exit_code is None:
            code = None
            try:
                if self.placed() and ray.wait([self._end], timeout=0)[0]:
                    code = int(ray.get(self._end))
                elif self._refusal and not self._patient:
                    code = ConfigError.exit_code
                    self._error = ProcessError("ConfigError", self._refusal, code)
            except RayTaskError as error:
                cause = error.cause or error
                code, self._error = 1, ProcessError(type(cause).__name__, str(cause))
            except RayError as error:
                code, self.place = -signal.SIGKILL, self._node
                if not self._node:  # nothing was killed, it was never started
                    self._error = ProcessError(type(error).__name__, _said(error))
            if code is not None:
                self._over(code)
        return self._exit_code

    def why(self) -> str:
        """As `Child.why`; what its log ends with says nothing of a lost node."""
        if self.place and self.error() is None:
            return f"node {self.place[:8]}, or its Ray actor there, was lost"
        return super().why()

    def error(self) -> ProcessError | None:
        """As `Child.error`; of a process that was not started, its node's or its actor's."""
        return self._error or super().error()

    def _over(self, code: int) -> None:
        self._exit_code = code
        with suppress(RayError):
            ray.kill(self._actor)
        self._gone()

    def terminate(self) -> None:
        """As `Child.terminate`, without waiting for the actor: others are asked meanwhile.
        What has no place yet has nothing to end."""
        if self.poll() is not None or not self.placed():
            self._give_up()
        else:
            self._actor.send.remote(int(signal.SIGTERM))

    def send(self, number: signal.Signals) -> bool:
        """As `Child.send`."""
        if self.poll() is not None or not self.placed():
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
            self._over(-signal.SIGKILL)


def _of_its_node(error: RayError) -> bool:
    """Whether a process was not started for want of something on its node, which can be mended."""
    never_made = isinstance(error, RayActorError) and error.actor_init_failed
    return never_made or isinstance(error, (RayTaskError, RuntimeEnvSetupError))


def answer(reference: Any, deadline_s: float = ANSWER_S) -> Any:
    """An actor's answer.

    Raises:
        SlipstreamError: it is gone, or silent.
    """
    try:
        return ray.get(reference, timeout=deadline_s)
    except RayError as error:
        raise SlipstreamError(f"a Ray actor does not answer: {error}") from error

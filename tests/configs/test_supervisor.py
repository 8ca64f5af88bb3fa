"""Supervision with stand-in processes: real subprocesses, tiny scripts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from slipstream.configs import doctor, policy
from slipstream.configs.child import Child, module_argv
from slipstream.configs.doctor import Doctor
from slipstream.configs.supervisor import Deadlines, Outcome, StopRequests, Supervisor

FOREVER = "import time; time.sleep(600)"
DONE = "pass"
DEADLINES = Deadlines(learner_save_s=3.0, learner_crash_s=1.0, end_s=1.0)
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
SAY_READY = "open('ready', 'w').close(); "

Start = Callable[..., dict[str, Child]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "processes").mkdir()
    return tmp_path


@pytest.fixture
def start(run_dir: Path) -> Iterator[Start]:
    """Starts stand-ins: `start(learner=script, ...)`; the others wait for ever."""
    started: list[Child] = []

    def start_children(**scripts: str) -> dict[str, Child]:
        roles = {"buffer": FOREVER, "feeder": FOREVER, "worker_0": FOREVER, "learner": FOREVER}
        children = {}
        for role, script in {**roles, **scripts}.items():
            name = role.replace("_", "-")
            children[name] = Child(name, [sys.executable, "-c", script], run_dir=run_dir)
            started.append(children[name])
        return children

    yield start_children
    for child in started:
        child.kill()


class Around:
    """What a session gives a supervisor, for stand-ins."""

    def __init__(self, run_dir: Path, tick: Callable[[str], None], scripts: dict[str, str]) -> None:
        self.run_dir, self.tick, self.scripts = run_dir, tick, scripts
        self.closed: list[str] = []
        self.said: list[str] = []
        self.started: list[str] = []
        self.gone: list[str] = []
        self.workers: int | None = None
        self.doctor = Doctor(run_dir, stall_s=2.0)
        self.close_run, self.say = self.closed.append, self.said.append
        self.lost, self.progress = self.gone.append, int
        self.stalled, self.chain = self.doctor.look, self.doctor.chain

    def start(self, name: str) -> Child:
        self.started.append(name)
        argv = [sys.executable, "-c", self.scripts.get(name, FOREVER)]
        return Child(name, argv, run_dir=self.run_dir)

    def wanted_workers(self, now: int) -> int:
        return now if self.workers is None else self.workers


def supervise(
    children: dict[str, Child],
    *,
    stop: StopRequests | None = None,
    tick: Callable[[str], None] = lambda phase: None,
    around: Around | None = None,
    restarts: int = 0,
) -> Outcome:
    around = around or Around(next(iter(children.values())).run_dir, tick, {})
    stop = stop or StopRequests()
    return Supervisor(children, around, stop, restarts=restarts, deadlines=DEADLINES).run()


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "condition did not come true in time"
        time.sleep(0.02)


def test_a_run_is_finished_when_learner_and_feeder_end_and_nobody_is_left(start: Start) -> None:
    phases: list[str] = []
    children = start(learner=DONE, feeder=DONE)
    around = Around(children["buffer"].run_dir, phases.append, {})
    outcome = supervise(children, around=around)
    assert outcome.status == "finished"
    assert around.closed == ["finished"]
    assert phases[-1] == "closing"
    assert all(child.poll() is not None for child in children.values())


def test_the_final_evaluation_takes_as_long_as_the_feeder_gives_it(start: Start) -> None:
    slow = "import time; time.sleep(2.5)"  # longer than every deadline of these tests but one
    assert supervise(start(learner=DONE, feeder=slow)).status == "finished"


@pytest.mark.parametrize("name", ["buffer", "feeder", "worker-0", "learner"])
def test_any_killed_process_ends_the_run_with_its_name_and_leaves_nobody(
    start: Start, name: str
) -> None:
    children = start()
    os.kill(children[name].pid, signal.SIGKILL)
    began = time.monotonic()
    outcome = supervise(children)
    assert (outcome.status, outcome.process) == ("failed", name)
    assert "was killed by SIGKILL" in outcome.reason
    assert time.monotonic() - began < 5.0
    assert all(child.poll() is not None for child in children.values())


def test_the_reason_a_process_recorded_is_the_reason_of_the_run(
    start: Start, run_dir: Path
) -> None:
    record = {"type": "TrainingFailed", "message": "loss is NaN at step 3", "exit_code": 2}
    path = run_dir / "processes" / "learner.error.json"
    script = f"open({str(path)!r}, 'w').write({json.dumps(record)!r}); raise SystemExit(1)"
    outcome = supervise(start(learner=script))
    assert outcome.reason == "TrainingFailed: loss is NaN at step 3"
    assert outcome.exit_code == 2  # as recorded: of a ConfigError it is 2


def test_without_a_record_the_reason_is_the_end_of_the_log(start: Start, run_dir: Path) -> None:
    outcome = supervise(start(worker_0="raise ValueError('no such tensor')"))
    assert "exited with code 1" in outcome.reason
    assert "ValueError: no such tensor" in outcome.reason
    assert str(run_dir / "logs" / "worker-0.log") in outcome.reason
    again = start(worker_0="raise SystemExit(3)")["worker-0"]
    again.wait(deadline_s=10.0)
    assert again.why() == "exited with code 3", "the log of an earlier one is not its own"


@pytest.mark.parametrize("name", ["buffer", "feeder", "worker-0"])
def test_a_killed_process_is_restarted_as_often_as_allowed_and_then_ends_the_run(
    start: Start, run_dir: Path, name: str
) -> None:
    around = Around(run_dir, lambda phase: None, {name: "import time; time.sleep(0.1); exit(3)"})
    children = start()
    os.kill(children[name].pid, signal.SIGKILL)
    outcome = supervise(children, around=around, restarts=2)
    assert around.started == [name, name]
    assert (outcome.status, outcome.process, outcome.go_back) == ("failed", name, False)
    kind = name.split("-")[0]
    assert outcome.reason.startswith(f"2 {kind} restarts in 600 s (cluster.restarts), then: exited")
    assert f"{kind} restart 1 of 2" in around.said[0]
    assert "was killed by SIGKILL" in around.said[0]
    assert all(child.poll() is not None for child in children.values())


@pytest.mark.parametrize(("progresses", "restarts"), [(False, 2), (True, 8)])
def test_failures_further_apart_than_the_window_are_given_up_unless_the_run_gets_further(
    monkeypatch: pytest.MonkeyPatch, progresses: bool, restarts: int
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(policy.time, "monotonic", lambda: now_s[0])
    budget, allowed = policy.Budget(2), 0
    for step in range(8):
        allowed += budget.spend("feeder", step if progresses else 0)
        now_s[0] += policy.WINDOW_S * 1.5
    assert allowed == restarts
    assert progresses or budget.exhausted("feeder").startswith(
        "2 feeder restarts without progress of the run (cluster.restarts), then: "
    )


def test_a_run_that_gets_further_is_given_up_when_failures_come_fast() -> None:
    budget = policy.Budget(2)
    assert [budget.spend("worker", step) for step in range(3)] == [True, True, False]


def test_a_killed_learner_takes_the_run_back_to_its_checkpoint(start: Start) -> None:
    children = start()
    os.kill(children["learner"].pid, signal.SIGKILL)
    outcome = supervise(children, restarts=1)
    assert (outcome.process, outcome.go_back) == ("learner", True)


@pytest.mark.parametrize("kind", ["ConfigError", "TrainingFailed"])
def test_who_says_why_it_cannot_go_on_is_not_restarted(
    start: Start, run_dir: Path, kind: str
) -> None:
    record = json.dumps({"type": kind, "message": "no", "exit_code": 2})
    path = run_dir / "processes" / "worker-0.error.json"
    script = f"open({str(path)!r}, 'w').write({record!r}); raise SystemExit(2)"
    around = Around(run_dir, lambda phase: None, {})
    outcome = supervise(start(worker_0=script), around=around, restarts=3)
    assert (outcome.status, outcome.exit_code, around.started) == ("failed", 2, [])


def test_all_that_went_with_one_node_is_one_failure_and_the_buffer_is_told(
    start: Start, run_dir: Path
) -> None:
    class Elsewhere(Child):
        """On a node that is gone, or waiting for one."""

        place = "node-1"

        def why(self) -> str:
            return "node node-1 was lost"

    class Waiting(Child):
        @property
        def waits_for(self) -> str:
            return "room on the cluster"

    around = Around(run_dir, lambda phase: None, {})
    around.start = lambda name: (  # type: ignore[method-assign]
        around.started.append(name)
        or Waiting(name, [sys.executable, "-c", FOREVER], run_dir=run_dir)
    )
    names, stop, children = [f"worker-{n}" for n in range(4)], StopRequests(), start()
    for name in names:
        children[name].kill() if name in children else None
        children[name] = Elsewhere(name, [sys.executable, "-c", DONE], run_dir=run_dir)

    def tick(phase: str) -> None:
        if len(around.started) == 4 and len(around.said) >= 8:
            stop.add()

    around.tick = tick
    outcome = supervise(children, around=around, stop=stop, restarts=1)
    assert outcome.status == "interrupted", outcome
    assert sorted(around.started) == sorted(around.gone) == names
    assert all("worker restart 1 of 1" in line for line in around.said if "restart" in line)
    assert sorted(line for line in around.said if "waits" in line) == [
        f"{name} waits for room on the cluster" for name in names
    ]


NO_ROOM = {"type": "OSError", "message": "[Errno 28] No space left on device: 'x'"}


@pytest.mark.parametrize("record", [{"type": "DiskFull", "message": "x cannot grow"}, NO_ROOM, {}])
def test_a_full_disk_ends_the_run_whoever_dies_of_it_and_can_say_so(
    start: Start, run_dir: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, str]
) -> None:
    path = run_dir / "processes" / "buffer.error.json"
    script = f"open({str(path)!r}, 'w').write({json.dumps(record)!r}); raise SystemExit(1)"
    if not record:  # not even its record could be written
        monkeypatch.setattr(policy, "FULL_BYTES", 2**80)
        script = "raise SystemExit(1)"
    around = Around(run_dir, lambda phase: None, {})
    outcome = supervise(start(buffer=script), around=around, restarts=3)
    assert (outcome.status, outcome.process, around.started) == ("failed", "buffer", [])
    assert record.get("message", f"No space left on device: {run_dir}; exited") in outcome.reason


def test_what_a_process_waits_for_is_said_once_and_again_when_it_is_something_else(
    start: Start, run_dir: Path
) -> None:
    class Waiting(Child):
        @property
        def waits_for(self) -> str:
            return words.pop(0) if words else ""

    words = ["room", "room", "its node", "its node"]
    children, stop = start(), StopRequests()
    children["worker-1"] = Waiting("worker-1", [sys.executable, "-c", FOREVER], run_dir=run_dir)
    around = Around(run_dir, lambda phase: None if words else stop.add(), {})
    assert supervise(children, around=around, stop=stop).status == "interrupted"
    assert around.said == ["worker-1 waits for room", "worker-1 waits for its node"]


def test_rollout_workers_join_and_leave_as_wanted(start: Start, run_dir: Path) -> None:
    around = Around(run_dir, lambda phase: None, {})
    stop, turns, children = StopRequests(), [3, 1], start()

    def turn(phase: str) -> None:
        workers = [name for name in children if name.startswith("worker")]
        if around.workers is None or len(workers) == around.workers:
            if not turns:
                stop.add()
            else:
                around.workers = turns.pop(0)

    around.tick = turn
    assert supervise(children, around=around, stop=stop).status == "interrupted"
    assert around.started == ["worker-1", "worker-2"]
    assert around.said == ["rollout workers: 1 -> 3", "rollout workers: 3 -> 1"]
    assert sorted(children) == ["buffer", "feeder", "learner", "worker-0"]


def test_why_one_that_was_leaving_hung_is_not_said_of_the_next_of_its_name(
    start: Start, run_dir: Path
) -> None:
    around = Around(run_dir, lambda phase: None, {"worker-1": "raise SystemExit('a fault')"})
    around.workers = 1
    found = start(worker_1=IGNORE_SIGTERM + SAY_READY + FOREVER)
    wait_for((run_dir / "ready").exists)

    def stalled(children: Mapping[str, Child]) -> list[doctor.Stall]:
        if "worker-1" not in children:
            around.workers = 2
        hangs = "worker-1" in children and around.said == ["rollout workers: 2 -> 1"]
        return [doctor.Stall("worker-1", "sleeps")] if hangs else []

    around.stalled = stalled
    outcome = supervise(found, around=around)
    assert any("sleeps" in line for line in around.said)
    assert around.started == ["worker-1"]
    assert (outcome.process, outcome.status) == ("worker-1", "failed")
    assert "a fault" in outcome.reason
    assert "sleeps" not in outcome.reason


def test_only_who_is_here_or_failed_for_good_is_left_among_those_that_speak(
    start: Start, run_dir: Path
) -> None:
    """A report would take one that left another machine for one that hangs there."""
    children, stop = start(learner=DONE, worker_1=FOREVER), StopRequests()
    around = Around(run_dir, lambda phase: None, {})
    around.workers = 1
    spoken = [run_dir / "processes" / f"{name}.waits.json" for name in children]
    for path in spoken:
        path.write_text("{}")
    os.kill(children["worker-0"].pid, signal.SIGKILL)

    left, end = set(), time.monotonic() + 15.0

    def turn(phase: str) -> None:
        nonlocal left
        left = {path.name.partition(".")[0] for path in spoken if path.exists()}
        if left == {"buffer", "feeder"} or time.monotonic() > end:
            stop.add()

    around.tick = turn
    supervise(children, around=around, stop=stop, restarts=1)
    assert around.started == ["worker-0"]
    assert left == {"buffer", "feeder"}


SPEAKS = """
import asyncio, pathlib, time
from slipstream.buffer import waits
from slipstream.buffer.process import run_process
async def work():
    with waits.waiting({owner!r}, {what!r}, {deadline}):
        {body}
run_process({name!r}, pathlib.Path("."), work())
"""


def speaking(name: str, owner: str, what: str, body: str, deadline: float = 0.0) -> str:
    return SPEAKS.format(name=name, owner=owner, what=what, body=body, deadline=deadline)


def test_a_stopped_process_is_found_said_and_restarted(
    start: Start, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SILENT_S", 3.0)
    around = Around(run_dir, lambda phase: None, {})
    script = speaking("worker-0", "worker-0", "nothing", "await asyncio.sleep(600)", 1e6)
    children, stop = start(worker_0=script), StopRequests()
    wait_for((run_dir / "processes" / "worker-0.waits.json").exists, 20)
    os.kill(children["worker-0"].pid, signal.SIGSTOP)
    around.tick = lambda phase: stop.add() if around.started else None
    supervise(children, around=around, stop=stop, restarts=1)
    assert around.started == ["worker-0"]
    assert "has been silent for" in around.said[1]
    assert "stopped by a signal" in around.said[1]
    assert "worker-0: hung" in around.said[2]


def spied_on_itself() -> str:
    """Why py-spy cannot be tried here; empty when it can."""
    spy = doctor.find_spy()
    if spy is None:
        return "py-spy is not installed"
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True); " + FOREVER], stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    command = [spy, "dump", "--nonblocking", "--pid", str(child.pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    child.kill()
    child.communicate()
    return f"this sandbox refuses py-spy: {done.stderr.strip()}" if done.returncode else ""


@pytest.mark.parametrize("spies", [False, True], ids=["by itself", "by py-spy"])
@pytest.mark.parametrize(
    ("body", "told", "frame"),
    [
        ("await asyncio.sleep(600)", "waited .* s for the engine of worker-0", "select"),
        (
            "time.sleep(600)",
            "waited .* s for the engine of worker-0|event loop has not turned",
            "work",
        ),
    ],
)
def test_a_wait_past_its_deadline_is_found_with_its_chain_and_its_stacks(
    start: Start,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    told: str,
    frame: str,
    spies: bool,
) -> None:
    if spies and (why := spied_on_itself()):
        pytest.skip(why)
    monkeypatch.setattr(doctor, "SLACK_S", 0.0)
    if not spies:
        monkeypatch.setattr(doctor, "find_spy", lambda: None)
    around = Around(run_dir, lambda phase: None, {})
    what = "the engine of worker-0"
    children = start(worker_0=speaking("worker-0", "group 7 sample 3", what, body))
    stop = StopRequests()
    around.tick = lambda phase: stop.add() if around.started else None
    supervise(children, around=around, stop=stop, restarts=1)
    assert re.search(told, around.said[1]), around.said
    log = children["worker-0"].log_path
    stacks = log.with_suffix(".stacks.txt") if spies else log
    assert f"stacks in {stacks}" in around.said[1]
    line = rf" (\w+\.)*{frame} \(.*:\d+\)" if spies else rf"line \d+ in {frame}"
    assert re.search(rf"{line}$", stacks.read_text(), re.MULTILINE), stacks.read_text()
    assert around.started == ["worker-0"]


def test_who_lost_a_peer_is_not_blamed_for_the_peers_end(start: Start, run_dir: Path) -> None:
    record = json.dumps({"type": "PeerLost", "message": "buffer silent", "exit_code": 1})
    path = run_dir / "processes" / "feeder.error.json"
    children = start(
        feeder=f"open({str(path)!r}, 'w').write({record!r}); raise SystemExit(1)",
        learner="raise MemoryError('the cause')",
    )
    for name in ("feeder", "learner"):
        children[name].wait(deadline_s=5.0)
    assert supervise(children).process == "learner"


@pytest.mark.parametrize("name", ["buffer", "worker-0"])
def test_a_process_that_ends_before_it_was_told_to_is_a_failure_even_with_code_0(
    start: Start, name: str
) -> None:
    outcome = supervise(start(**{name.replace("-", "_"): DONE}))
    assert (outcome.status, outcome.process) == ("failed", name)


def test_ctrl_c_lets_the_learner_save_before_the_buffer_ends(start: Start, run_dir: Path) -> None:
    order = run_dir / "order"
    script = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep({delay}); open({order!r}, 'a').write('{name} '); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); open('{name}.up', 'w').close(); time.sleep(600)"
    )
    roles = {"learner": 0.5, "feeder": 0.0, "buffer": 0.0}
    children = start(
        **{n: script.format(delay=d, order=str(order), name=n) for n, d in roles.items()}
    )
    wait_for(lambda: all((run_dir / f"{name}.up").exists() for name in roles))
    stop = StopRequests()
    stop.add()
    assert supervise(children, stop=stop).status == "interrupted"
    assert order.read_text().split() == ["learner", "feeder", "buffer"]


def test_a_second_ctrl_c_kills_at_once(start: Start, run_dir: Path) -> None:
    children = start(learner=IGNORE_SIGTERM + SAY_READY + FOREVER)
    wait_for((run_dir / "ready").exists)
    stop = StopRequests()
    stop.count = 2
    began = time.monotonic()
    assert supervise(children, stop=stop).status == "interrupted"
    assert time.monotonic() - began < 1.5


def test_processes_that_can_be_ended_only_by_a_deadline_are_ended_in_the_time_of_one(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Far(Child):
        """On a node that does not answer."""

        def kill(self) -> None:
            if self.poll() is None:
                time.sleep(2.0)
            super().kill()

    children = start(**{f"worker_{n}": FOREVER for n in range(8)})
    for number in range(8):
        children[f"worker-{number}"].__class__ = Far
        monkeypatch.setattr(children[f"worker-{number}"], "terminate", lambda: None)
    began = time.monotonic()
    os.kill(children["learner"].pid, signal.SIGKILL)
    supervise(children)
    assert 2.0 < time.monotonic() - began < 12.0, "not eight times 2 s"
    assert all(child.poll() is not None for child in children.values())


def test_a_process_deaf_to_sigterm_is_killed_at_its_deadline(start: Start, run_dir: Path) -> None:
    children = start(worker_0=IGNORE_SIGTERM + SAY_READY + FOREVER, learner=DONE, feeder=DONE)
    wait_for((run_dir / "ready").exists)
    assert supervise(children).status == "finished"
    assert children["worker-0"].poll() == -signal.SIGKILL


def test_a_signal_to_the_supervisor_is_a_request_to_stop(start: Start) -> None:
    stop = StopRequests()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: stop.count == 1)
        assert supervise(start(), stop=stop).status == "interrupted"


def test_grandchildren_end_with_the_child_that_started_them(run_dir: Path) -> None:
    script = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])\n"
        "open('grandchild', 'w').write(str(p.pid))"
    )
    child = Child("worker-0", [sys.executable, "-c", script], run_dir=run_dir)
    assert child.wait(deadline_s=10.0) == 0
    grandchild = int((run_dir / "grandchild").read_text())
    wait_for(lambda: not _runs(grandchild))


def test_children_do_not_see_the_terminals_ctrl_c_and_have_bounded_threads(run_dir: Path) -> None:
    script = "import os; print(os.getsid(0) == os.getpid(), os.environ['OMP_NUM_THREADS'])"
    child = Child("learner", [sys.executable, "-c", script], run_dir=run_dir, threads=3)
    child.wait(deadline_s=10.0)
    assert child.log_path.read_text().split() == ["True", "3"]


def test_a_process_whose_supervisor_died_before_it_was_up_ends_itself(run_dir: Path) -> None:
    script = (
        "import asyncio, pathlib, sys; from slipstream.buffer.process import run_process\n"
        "run_process('late', pathlib.Path('.'), asyncio.sleep(600))"
    )
    environment = {"SLIPSTREAM_PARENT_PID": "999999999"}
    child = Child("late", [sys.executable, "-c", script], run_dir=run_dir, environment=environment)
    assert child.wait(deadline_s=20.0) in (0, -signal.SIGTERM)


def test_the_working_directory_is_not_importable_by_a_child() -> None:
    assert "-P" in module_argv("learner.loop", Path("spec.json"))


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

"""A run from its processes' start to its closing screen, over as many branches as it takes."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from ..buffer.errors import ConfigError, SlipstreamError
from ..learner.checkpoint import complete_folders
from .audit import audit_run
from .child import Child, kill_all
from .closing import print_closing, resume_line
from .doctor import Doctor
from .engines import check_engine
from .exporting import export_run
from .observer import Observer
from .ray_cluster import use_our_token
from .reporter import Reporter
from .result import Audited, Result, RunResult, summarise
from .run_dir import end_branch, read_run
from .scaling import Balance, Scaling, asked, balance, forget
from .schema import Experiment, with_workers
from .scratch import Scratch, scratch
from .sizes import DTYPE_BYTES, model_size
from .specs import Launch, ProcessPlan, process_names, process_plan
from .supervisor import POLL_S, Deadlines, Outcome, Stopped, StopRequests, Supervisor, outcome_of

EXIT_CODES = {"finished": 0, "interrupted": 130}

SILENT_S = 5.0
"""A launcher that waits longer says what for."""

UNKNOWN_MODEL_BYTES = 2 * 2**30
"""Assumed for a model whose config does not tell its size; decides only tmpfs or disk."""

Reopen = Callable[[], Launch]
Start = Callable[[ProcessPlan], Child]


Work = Callable[[Launch, Reporter, StopRequests], Outcome]


def run_branches(
    launch: Launch, console: Console, reopen: Reopen, *, export: bool = True
) -> RunResult:
    """Run the newest branch, and those that continue it when the policy says so, to the end,
    whatever it is; print the closing screen.

    Args:
        launch: the run and its newest branch.
        console: where displays go.
        reopen: opens the next branch, from the newest checkpoint.
        export: whether a finished run is exported.
    """
    return _session(launch, console, _supervise, reopen, export=export)


def run_warm_start(launch: Launch, console: Console, reopen: Reopen) -> RunResult:
    """Run only the warm start, export it, and print the closing screen."""
    return _session(launch, console, _follow_warm_start, reopen, export=True)


def _session(
    launch: Launch, console: Console, work: Work, reopen: Reopen, *, export: bool
) -> RunResult:
    """Do the work under a display, conclude, and leave run.json telling how it ended."""
    stop, went_back, saved = StopRequests(), 0, _saved(launch)
    forget(launch.run_dir)
    try:
        with stop.listening():
            while True:
                with Reporter(launch, console) as reporter:
                    outcome = work(launch, reporter, stop)
                    went_back = went_back if _saved(launch) == saved else 0
                    if went_back == launch.experiment.cluster.restarts:
                        outcome = _given_up(outcome, went_back)
                    if not outcome.go_back or stop.count:
                        result = _conclude(launch, outcome, reporter, stop, export=export)
                        break
                went_back, saved = went_back + 1, _saved(launch)
                _say(console, launch, f"{outcome.process}: {outcome.reason}")
                end_branch(launch.run_dir, "failed", f"{outcome.process}: {outcome.reason}", None)
                launch = _as_scaled(reopen())
    except BaseException as error:
        # Our own mistake, a tracker's or a full disk: the children are gone, and run.json must say
        # so, where it can be written.
        with suppress(OSError):
            end_branch(launch.run_dir, "failed", f"{type(error).__name__}: {error}", None)
        # A cluster that a branch fitted on may have lost a node that nobody replaced.
        refused = went_back > 0 and isinstance(error, ConfigError)
        if isinstance(error, OSError) or refused:
            line = f"{error}; once that is mended, continue with: {resume_line(launch.run_dir)}"
            raise (ConfigError if refused else SlipstreamError)(line) from error
        raise
    done = RunResult(
        run_dir=launch.run_dir,
        seed=launch.experiment.seed,
        status=outcome.status,
        exit_code=_exit_code(result, outcome),
        result=result,
    )
    print_closing(done, console, tensorboard=launch.experiment.track.tensorboard)
    return done


def _as_scaled(launch: Launch) -> Launch:
    """The same with as many rollout workers as `slipstream scale` asked for meanwhile."""
    if (workers := asked(launch.run_dir)) is None:
        return launch
    return dataclasses.replace(launch, experiment=with_workers(launch.experiment, workers))


def _given_up(outcome: Outcome, went_back: int) -> Outcome:
    """The same end, after which the run does not go back once more."""
    if not outcome.go_back:
        return outcome
    why = f"went back {went_back} times to one checkpoint (cluster.restarts), then: "
    return dataclasses.replace(outcome, reason=why + outcome.reason, go_back=False)


def _saved(launch: Launch) -> list[str]:
    """The checkpoints there are: what reaches a new one is not going round in circles."""
    return [folder.name for folder in complete_folders(launch.run_dir / "checkpoints")]


def _say(console: Console, launch: Launch, line: str) -> None:
    """Tell the user, and keep it beside the processes' logs."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    with suppress(OSError), (launch.run_dir / "logs" / "supervisor.log").open("a") as log:
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def _follow_warm_start(launch: Launch, reporter: Reporter, stop: StopRequests) -> Outcome:
    """Start the one process of a warm start and wait for it."""
    places = Scratch(endpoint="ipc://none", weights_dir=launch.run_dir)
    plan = process_plan(launch, places, "learner")
    alone = plan.spec.model_copy(update={"ranks": 1})
    plan = dataclasses.replace(plan, module="learner.warm_start", spec=alone)
    child = plan.start(launch.run_dir, Path(launch.run.working_dir))
    try:
        while child.poll() is None and not stop.count:
            reporter.tick("warm start")
            time.sleep(POLL_S)
        if stop.count:
            child.terminate()
            child.wait(Deadlines().end_s)
            return Outcome(status="interrupted", reason="stopped on request")
    finally:
        child.kill()
    if child.poll() != 0:
        return outcome_of(child)
    return Outcome(status="finished")


def check_launcher(experiment: Experiment) -> None:
    """See that the processes could be started at all.

    Raises:
        ConfigError: Ray is asked for, and is not installed or not there; or the engine is not.
    """
    if experiment.launcher != "ray":
        check_engine(experiment.rollout)
        return
    use_our_token(experiment.cluster.address)
    try:
        from .ray_launcher import find_cluster
    except ImportError:
        raise ConfigError("launcher = \"ray\" needs Ray: pip install 'slipstream[ray]'") from None
    find_cluster(experiment.cluster.address)


@contextmanager
def _launcher(launch: Launch, waits: Callable[[str], None]) -> Iterator[tuple[Scratch, Start]]:
    """Where the run's processes meet, and who starts them."""
    if launch.experiment.launcher == "ray":
        check_launcher(launch.experiment)
        from .ray_launcher import ray_launcher

        with ray_launcher(launch, _version_bytes(launch), waits) as both:
            yield both
        return
    working_dir = Path(launch.run.working_dir)
    fetch = launch.experiment.buffer.weights == "zmq"
    size = _version_bytes(launch)
    with scratch(launch.run_dir, launch.run.run_id, size, fetch=fetch) as places:
        yield places, lambda plan: plan.start(launch.run_dir, working_dir)


def _supervise(launch: Launch, reporter: Reporter, stop: StopRequests) -> Outcome:
    """Start the processes and follow them; afterwards none is left."""
    try:
        return _start_and_follow(launch, reporter, stop)
    except Stopped:
        return Outcome(status="interrupted", reason="stopped on request")


def _start_and_follow(launch: Launch, reporter: Reporter, stop: StopRequests) -> Outcome:
    children: dict[str, Child] = {}
    for said in (launch.run_dir / "processes").glob("*.waits.json"):
        said.unlink(missing_ok=True)  # of the branch before: more workers, perhaps
    with _launcher(launch, _Waits(launch, reporter, stop)) as (places, start):
        around = _Around(launch, reporter, places, start)
        try:
            for name in process_names(launch.experiment):
                children[name] = around.start(name)
            around.observer.start()
            restarts = launch.experiment.cluster.restarts
            return Supervisor(children, around, stop, restarts=restarts).run()
        finally:
            kill_all(children.values())  # a start that failed halfway
            around.observer.stop()
            if (measured := around.measure()) is not None:
                _say(reporter.console, launch, measured.line(around.workers))


class _Waits:
    """Told what a launcher waits for: says so after `SILENT_S`, and once more when it changes."""

    def __init__(self, launch: Launch, reporter: Reporter, stop: StopRequests) -> None:
        self._launch, self._reporter, self._stop = launch, reporter, stop
        self._from_s, self._said = time.monotonic() + SILENT_S, ""

    def __call__(self, what: str) -> None:
        if self._stop.count:
            raise Stopped
        self._reporter.tick("placing")
        if what != self._said and time.monotonic() > self._from_s:
            self._said = what
            _say(self._reporter.console, self._launch, f"waits for {what}")


class _Around:
    """The supervisor's surroundings: see `supervisor.Surroundings`."""

    def __init__(self, launch: Launch, reporter: Reporter, places: Scratch, start: Start) -> None:
        self._launch, self._reporter, self._places, self._start = launch, reporter, places, start
        doctor = Doctor(launch.run_dir, launch.experiment.cluster.stall_s)
        self._scaling = Scaling(launch.run_dir, launch.experiment.cluster)
        self.workers = launch.experiment.rollout.workers
        self.observer = reporter.observer = Observer(places.endpoint, launch.run.run_id)
        self.close_run, self.lost = self.observer.close_run, self.observer.lost
        self.stalled, self.chain = doctor.look, doctor.chain
        self._quarantined: set[int] | None = None if launch.branch else set()
        """The prompts of which it is said; None until it is known what earlier branches said."""

    def tick(self, phase: str) -> None:
        self._reporter.tick(phase)
        if (stats := self._reporter.progress.stats) is None:
            return
        found = stats.quarantined
        if self._quarantined is None:
            self._quarantined = set(found)
            if found:
                self.say(f"prompts quarantined before: {len(found)} ({_first(found)})")
        for uid in sorted(found.keys() - self._quarantined):
            folder = self._launch.run_dir
            self.say(
                f"prompt {uid} is quarantined: {found[uid]}; `slipstream show {folder} --prompt "
                f"{uid}` tells more"
            )
        self._quarantined |= found.keys()

    def start(self, name: str) -> Child:
        return self._start(process_plan(self._launch, self._places, name))

    def say(self, line: str) -> None:
        _say(self._reporter.console, self._launch, line)

    def measure(self) -> Balance | None:
        return balance(self._reporter.progress.rows, self.observer.latest, self.workers)

    def progress(self) -> Hashable:
        return self._reporter.progress.reached

    def wanted_workers(self, now: int) -> int:
        self.workers = now
        return self._scaling.wanted(now, self.measure)


def _first(uids: Iterable[int], number: int = 10) -> str:
    """The first of them, in words."""
    told = sorted(uids)
    return ", ".join(map(str, told[:number])) + (", ..." if len(told) > number else "")


def _version_bytes(launch: Launch) -> int:
    size = model_size(launch.experiment.model)
    if size is None:
        return UNKNOWN_MODEL_BYTES
    return size.num_parameters * DTYPE_BYTES[launch.experiment.dtype]


def _conclude(
    launch: Launch, outcome: Outcome, reporter: Reporter, stop: StopRequests, *, export: bool
) -> Result:
    """Export, audit, and record what the run came to."""
    run_dir, experiment = launch.run_dir, launch.experiment
    reporter.tick("exporting" if export and outcome.status == "finished" else "auditing")
    exported = None
    if export and outcome.status == "finished":
        exported = export_run(
            run_dir, run_dir / "export", tick=lambda: reporter.tick("exporting"), stop=stop
        )
    reporter.tick("auditing")
    audited = _audit(run_dir)
    reason = f"{outcome.process}: {outcome.reason}" if outcome.process else outcome.reason
    ended = [(each.ended_s or time.time()) - each.started_s for each in read_run(run_dir).branches]
    result = summarise(
        run_dir,
        status=outcome.status,
        reason=reason,
        planned_steps=experiment.learner.steps,
        created_s=launch.run.created_s,
        seconds=sum(ended),
        exported=exported,
        audited=audited,
    )
    end_branch(run_dir, outcome.status, reason, result)
    return result


def _audit(run_dir: Path) -> Audited | None:
    """Whether every prompt is accounted for; None when there is no ledger yet."""
    if not (run_dir / "ledger.sqlite").exists():
        return None
    try:
        report = audit_run(run_dir)
    except SlipstreamError as error:
        return Audited(ok=False, line=str(error))
    return Audited(ok=report.ok, line=report.line)


def _exit_code(result: Result, outcome: Outcome) -> int:
    """Of a failed run its process's own; 0 only when what a finished run promises holds as well."""
    broken = (result.export is not None and not result.export.ok) or (
        result.audit is not None and not result.audit.ok
    )
    code = EXIT_CODES.get(outcome.status, outcome.exit_code)
    return 1 if code == 0 and (broken or result.staleness_violations) else code

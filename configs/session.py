"""One branch of a run, from the start of its processes to its closing screen."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ..buffer.errors import SlipstreamError
from .audit import audit_run
from .child import Child
from .closing import print_closing
from .exporting import export_run
from .observer import Observer
from .reporter import Reporter
from .result import Audited, Result, RunResult, summarise
from .run_dir import end_branch, read_run
from .scratch import Scratch, scratch
from .sizes import DTYPE_BYTES, model_size
from .specs import Launch, process_plans
from .supervisor import POLL_S, Deadlines, Outcome, StopRequests, Supervisor, failure_of

EXIT_CODES = {"finished": 0, "interrupted": 130}

UNKNOWN_MODEL_BYTES = 2 * 2**30
"""Assumed for a model whose config does not tell its size; decides only tmpfs or disk."""


def run_branch(launch: Launch, console: Console, *, export: bool = True) -> RunResult:
    """Run the newest branch to its end, whatever the end is, and print the closing screen.

    Args:
        launch: the run and its newest branch.
        console: where displays go.
        export: whether a finished run is exported.
    """
    return _session(launch, console, _supervise, export=export)


def run_warm_start(launch: Launch, console: Console) -> RunResult:
    """Run only the warm start, export it, and print the closing screen."""
    return _session(launch, console, _follow_warm_start, export=True)


Work = Callable[[Launch, Reporter, StopRequests], Outcome]


def _session(launch: Launch, console: Console, work: Work, *, export: bool) -> RunResult:
    """Do the work under a display, conclude, and leave run.json telling how it ended."""
    stop = StopRequests()
    try:
        with stop.listening(), Reporter(launch, console) as reporter:
            outcome = work(launch, reporter, stop)
            result = _conclude(launch, outcome, reporter, stop, export=export)
    except BaseException as error:
        # Our own mistake or a tracker's: the children are gone, and run.json must say so.
        end_branch(launch.run_dir, "failed", f"{type(error).__name__}: {error}", None)
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


def _follow_warm_start(launch: Launch, reporter: Reporter, stop: StopRequests) -> Outcome:
    """Start the one process of a warm start and wait for it."""
    places = Scratch(endpoint="ipc://none", weights_dir=launch.run_dir)
    learner, *_ = process_plans(launch, places)
    plan = dataclasses.replace(learner, module="learner.warm_start")
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
        return failure_of(child)
    return Outcome(status="finished")


def _supervise(launch: Launch, reporter: Reporter, stop: StopRequests) -> Outcome:
    """Start the processes and follow them; afterwards none is left."""
    working_dir = Path(launch.run.working_dir)
    children: dict[str, Child] = {}
    with scratch(launch.run_dir, launch.run.run_id, _version_bytes(launch)) as places:
        reporter.observer = observer = Observer(places.endpoint, launch.run.run_id)
        try:
            for plan in process_plans(launch, places):
                children[plan.name] = plan.start(launch.run_dir, working_dir)
            observer.start()
            supervisor = Supervisor(
                children, close_run=observer.close_run, tick=reporter.tick, stop=stop
            )
            return supervisor.run()
        finally:
            for child in children.values():  # a start that failed halfway
                child.kill()
            observer.stop()


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

"""`slipstream buffer RUN`: what the buffer holds, read from the run's ledger, alive or dead."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..buffer.errors import CorruptData
from ..buffer.journal import Journal
from ..buffer.staleness import capacity
from ..buffer.state import State
from .doctor import published_by
from .run_dir import read_experiment, read_run
from .schema import Experiment

WORDS = ("WAITING", "INFLIGHT", "READY", "TAKEN", "TRAINED", "DROPPED")
MANY_ATTEMPTS = 3
"""A group issued so often is named."""
MOST_NAMED = 5


def look(run_dir: Path) -> list[str]:
    """States, law, lags, leases, drops and waits of a run's buffer, a line each.

    The ledger is only read, so it may be a run that goes on: what is acknowledged is seen.

    Raises:
        ConfigError: the folder holds no run.
        CorruptData: there is no ledger, or it does not fold.
    """
    run, experiment = read_run(run_dir), read_experiment(run_dir)
    journal = Journal(run_dir, writable=False)
    try:
        state = _folded(journal)
    finally:
        journal.close()
    version = state.newest
    return [
        f"{run_dir.name}: {run.status}, {journal.sequence:,} events; newest version "
        f"{version if version is not None else 'none yet'}, next step {state.next_step}",
        *_states(state, experiment),
        *_lags(state),
        *_leases(state),
        *_often_issued(state),
        *_waits(run_dir),
    ]


def _folded(journal: Journal) -> State:
    state = State()
    for number, event in enumerate(journal.events(), start=1):
        try:
            state.apply(event)
        except (LookupError, AssertionError) as error:
            kind = type(event).__name__
            raise CorruptData(
                f"event {number} of the ledger ({kind}) does not follow from those before it: "
                f"{error!r}; `slipstream audit` says what that leaves in doubt"
            ) from error
    return state


def _states(state: State, experiment: Experiment) -> Iterator[str]:
    counts = ", ".join(f"{state.counts[word]:,} {word}" for word in WORDS if state.counts[word])
    yield f"groups: {counts or 'none'}"
    bound, prompts = experiment.buffer.max_staleness_steps, experiment.learner.prompts_per_step
    if state.newest is not None:
        allowed = capacity(state.newest.step, bound, prompts)
        yield (
            f"law: {state.num_admitted:,} of {allowed:,} admitted = (version {state.newest.step} "
            f"+ S {bound:g} + 1) x P {prompts}"
        )
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in state.dropped.items())
    yield f"samples dropped: {dropped or 'none'}"
    if state.trained.trajectories:
        yield (
            f"length: {state.trained.mean:.1f} tokens a trained sample, {state.finished.mean:.1f} "
            f"a finished one"
        )


def _lags(state: State) -> Iterator[str]:
    """How old the oldest token of each open group would be in the next step."""
    for word in ("READY", "INFLIGHT"):
        lags = Counter(
            state.next_step - 1 - oldest
            for uid in state.uids(word)
            if (oldest := state.oldest_step(state.groups[uid])) is not None
        )
        if lags:
            shown = ", ".join(f"{number} at lag {lag}" for lag, number in sorted(lags.items()))
            yield f"{word}: {shown}"


def _leases(state: State) -> Iterator[str]:
    """What each worker holds."""
    samples, versions = Counter[str](), dict[str, int]()
    for lease in state.leases.values():
        samples[lease.worker] += len(lease.open)
        group = state.groups[lease.uid]
        for index in lease.open:
            step = group.samples[index].claimed[1]
            versions[lease.worker] = min(versions.get(lease.worker, step), step)
    for worker in sorted(samples):
        if samples[worker]:
            yield (
                f"{worker}: {samples[worker]} samples leased, the oldest under version "
                f"{versions[worker]}"
            )


def _often_issued(state: State) -> Iterator[str]:
    often = [
        uid
        for word in ("WAITING", "INFLIGHT", "READY")
        for uid, group in state.groups.items()
        if group.state == word and group.attempt >= MANY_ATTEMPTS
    ]
    for uid in often[:MOST_NAMED]:
        yield f"group {uid} is at attempt {state.groups[uid].attempt}: it may never fit the bound"
    if len(often) > MOST_NAMED:
        yield f"(and {len(often) - MOST_NAMED} more)"


def _waits(run_dir: Path) -> Iterator[str]:
    """Who waits, as the processes published it last."""
    for name, said in published_by(run_dir / "processes"):
        if name != "buffer" and said.waits:
            oldest = max(said.waits, key=lambda wait: wait.waited_s)
            yield f"{oldest.owner} waits {oldest.waited_s:.0f} s for {oldest.what}"

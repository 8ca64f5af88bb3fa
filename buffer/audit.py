"""Whether every prompt is accounted for: issued = trained + dropped(reason) + open.

Each term comes from another source, so that one mistake cannot hide itself: issued from the seeded
stream (the caller regenerates it), trained and dropped from the ledger's rows along the surviving
lineage, open from the fold of the events. The tokens trained are read back from the segments and
held against the law again.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import events
from .errors import CorruptData
from .events import AnyEvent
from .journal import Journal
from .records import TrainingSample, Trajectory, Version
from .staleness import LivePath, proof_line
from .state import State


@dataclass(slots=True)
class AuditReport:
    """What was counted and what does not add up."""

    issued: int = 0
    trained: int = 0
    """In groups TAKEN at or below the last checkpoint of the lineage."""
    taken: int = 0
    """TAKEN after it; a resume would train them again."""
    dropped: dict[str, int] = field(default_factory=dict)
    open: dict[str, int] = field(default_factory=dict)
    """By lifecycle word: WAITING, INFLIGHT, READY."""
    steps: int = 0
    demonstrations: int = 0
    """Earlier successes that steps trained, too; no part of the equation."""
    compacted_steps: int = 0
    """Their rollouts were removed; what their proof lines say cannot be counted again."""
    max_lag: int = 0
    violations: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything adds up."""
        return not self.faults

    @property
    def line(self) -> str:
        """The equation, or the first thing that is wrong with it."""
        return self.lines()[0] if self.ok else self.faults[0]

    def lines(self) -> list[str]:
        """The report in words, the equation first."""
        ended = [f"{n} dropped({reason})" for reason, n in sorted(self.dropped.items())]
        still = [f"{n} {word}" for word, n in sorted(self.open.items())]
        terms = [f"{self.trained} trained", f"{self.taken} TAKEN", *ended, *still]
        return [
            f"issued {self.issued} = {' + '.join(terms)}",
            f"{self.steps} steps, largest lag {self.max_lag}, {self.violations} violations",
            *([f"{self.demonstrations} demonstrations"] if self.demonstrations else []),
            *(
                [f"of {self.compacted_steps} steps the rollouts are removed: not counted again"]
                if self.compacted_steps
                else []
            ),
            *(f"FAULT: {fault}" for fault in self.faults),
            "ok" if self.ok else f"{len(self.faults)} faults",
        ]


@dataclass(slots=True)
class Lineage:
    """What the ledger's rows say happened along the surviving path."""

    path: LivePath
    put: Counter[int] = field(default_factory=Counter)
    taken: dict[int, list[events.Taken]] = field(default_factory=dict)
    """step -> its groups."""
    proofs: dict[int, events.StepTaken] = field(default_factory=dict)
    dropped: dict[int, list[str]] = field(default_factory=dict)
    """uid -> reasons."""
    checkpoint: int = 0
    shown: list[events.Demonstrated] = field(default_factory=list)
    begun: int = 0
    """The last step of which parts were handed out."""
    first_segment: int = 0
    """Those below were removed, by an event that says so."""


def audit(
    run_dir: Path,
    issued_uids: Iterable[int],
    *,
    max_staleness_steps: float | None = None,
    max_uses: int = 1,
    until: int | None = None,
) -> AuditReport:
    """Count a run's prompts from independent sources and compare.

    Args:
        run_dir: a run folder, of a run that is alive or not.
        issued_uids: the uids that the regenerated prompt stream gives, up to the journal's last.
        max_staleness_steps: S, to hold the trained tokens against; None believes the bound in
            each step's proof line.
        max_uses: steps that may train a group.
        until: the last row that is looked at, which is the last one that `issued_uids` knows of: a
            run that is alive puts prompts meanwhile. None: all.
    Raises:
        CorruptData: there is no ledger to audit.
    """
    journal = Journal(run_dir, writable=False)
    report = AuditReport()
    try:
        stored = journal.events(until=until)
        _check_sequence(journal, report)
        lineage = _walk(stored)
        _check_prompts(lineage, set(issued_uids), _fold(stored, report), max_uses, report)
        _check_steps(lineage, journal, stored, max_staleness_steps, report)
        _check_demonstrations(lineage, stored, report)
    finally:
        journal.close()
    return report


def _check_sequence(journal: Journal, report: AuditReport) -> None:
    """Rows are numbered without gaps: a missing one was deleted."""
    numbers = [row[0] for row in journal.rows()]
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    if missing:
        report.faults.append(f"{len(missing)} rows are missing from the ledger, first {missing[0]}")


def _walk(stored: list[AnyEvent]) -> Lineage:
    """Read the rows once, keeping what lies on the path of the last branch."""
    opened = [event for event in stored if isinstance(event, events.BranchOpened)]
    lineage = Lineage(LivePath(opened[-1].branch, opened[-1].parents) if opened else LivePath(0))
    if opened:
        lineage.checkpoint = opened[-1].resumed_at
    branch = 0
    for event in stored:
        match event:
            case events.BranchOpened():
                branch = event.branch
            case events.Put():
                lineage.put[event.uid] += 1
                if event.num_samples == 0:
                    lineage.dropped.setdefault(event.uid, []).append("skipped")
            case events.Published(manifest=manifest):
                lineage.path.publish(manifest.version)
            case events.Taken() if Version(branch=branch, step=event.step) in lineage.path:
                lineage.taken.setdefault(event.step, []).append(event)
            case events.StepBegun() if Version(branch=branch, step=event.step) in lineage.path:
                lineage.begun = event.step
            case events.StepTaken() if Version(branch=branch, step=event.step) in lineage.path:
                lineage.proofs[event.step] = event
            case events.Dropped() if Version(branch=branch, step=event.step) in lineage.path:
                lineage.dropped.setdefault(event.uid, []).append(event.reason)
            case events.Demonstrated() if Version(branch=branch, step=event.step) in lineage.path:
                lineage.shown.append(event)
            case events.Compacted():
                lineage.first_segment = event.first_segment
            case events.Checkpointed() if branch == lineage.path.branch:
                lineage.checkpoint = max(lineage.checkpoint, event.step)
            case _:
                pass
    return lineage


def _fold(stored: list[AnyEvent], report: AuditReport) -> State:
    """The state the service would have; a ledger that does not fold is a fault."""
    state = State()
    for number, event in enumerate(stored, start=1):
        try:
            state.apply(event)
        except (LookupError, AssertionError) as error:
            kind = type(event).__name__
            report.faults.append(f"event {number} ({kind}) does not follow: {error!r}")
            break
    return state


def _check_prompts(
    lineage: Lineage, issued: set[int], state: State, max_uses: int, report: AuditReport
) -> None:
    """The equation, per uid: each is issued once and is in exactly one place."""
    places: dict[int, list[str]] = {uid: [] for uid in issued}
    for step, groups in sorted(lineage.taken.items()):
        for group in groups:
            places.setdefault(group.uid, []).append(f"step {step}")
            if len(places[group.uid]) == 1:
                report.trained += step <= lineage.checkpoint
                report.taken += step > lineage.checkpoint
    for uid, reasons in lineage.dropped.items():
        places.setdefault(uid, []).extend(f"dropped({reason})" for reason in reasons)
    for group in state.groups.values():
        if group.state in ("WAITING", "INFLIGHT", "READY"):
            places.setdefault(group.uid, []).append(group.state)
    report.issued = len(issued)
    report.dropped = dict(Counter(reason for all_ in lineage.dropped.values() for reason in all_))
    report.open = {
        word: state.counts[word] for word in ("WAITING", "INFLIGHT", "READY") if state.counts[word]
    }
    for uid, found in sorted(places.items()):
        if lineage.put[uid] != 1 or uid not in issued:
            asked = "is" if uid in issued else "is not"
            report.faults.append(f"uid {uid} {asked} in the stream, put {lineage.put[uid]} times")
        elif len(found) != 1 and not _trained_again(found, max_uses):
            report.faults.append(f"uid {uid} is {' and '.join(found) or 'nowhere'}")


def _trained_again(found: list[str], max_uses: int) -> bool:
    """Whether all places of a prompt are different steps, as many as are allowed."""
    steps = all(place.startswith("step ") for place in found)
    return steps and 1 < len(set(found)) == len(found) <= max_uses


def _check_steps(
    lineage: Lineage,
    journal: Journal,
    stored_events: list[AnyEvent],
    max_staleness_steps: float | None,
    report: AuditReport,
) -> None:
    """Every step is there, once; its tokens, read back, obey the law as its proof line says."""
    report.steps = len(lineage.taken)
    last = max([*lineage.taken, *lineage.proofs], default=0)
    payloads = _payloads(stored_events)
    for step in range(1, last + 1):
        groups, stored = lineage.taken.get(step, []), lineage.proofs.get(step)
        if groups and stored is None and step == last == lineage.begun:
            continue  # the others of its batch were not READY yet
        if not groups or stored is None:
            report.faults.append(f"step {step} is missing")
            continue
        refs = [payloads.get((g.uid, d.index)) for g in groups for d in g.decisions]
        if any(ref is not None and ref.segment < lineage.first_segment for ref in refs):
            report.compacted_steps += 1
            continue
        try:
            samples = [s for group in groups for s in _samples(group, journal, payloads)]
        except (CorruptData, LookupError) as error:
            if _removed_meanwhile(journal, refs):
                report.compacted_steps += 1
                continue
            report.faults.append(f"step {step}: a trained trajectory is unreadable: {error}")
            continue
        bound = stored.proof.bound if max_staleness_steps is None else max_staleness_steps
        proof = proof_line(samples, step=step, max_staleness_steps=bound, path=lineage.path)
        report.max_lag = max(report.max_lag, proof.max_lag)
        report.violations += proof.violations
        if proof.violations:
            report.faults.append(f"step {step} trained {proof.violations} tokens over the bound")
        if proof.lag_counts != stored.proof.lag_counts:
            report.faults.append(f"step {step}: the proof line differs from the stored tokens")


def _removed_meanwhile(journal: Journal, refs: list[events.Ref | None]) -> bool:
    """Whether a run that is alive has removed what these refer to since its events were read."""
    removed = [e.first_segment for e in journal.events() if isinstance(e, events.Compacted)]
    return any(ref is not None and ref.segment < max(removed, default=0) for ref in refs)


def _check_demonstrations(lineage: Lineage, stored: list[AnyEvent], report: AuditReport) -> None:
    """Each is a finished sample of the same prompt, shown once."""
    report.demonstrations = len(lineage.shown)
    puts = {event.uid: event for event in stored if isinstance(event, events.Put)}
    finished = {
        (event.uid, event.index, event.payload)
        for event in stored
        if isinstance(event, events.Finished) and event.facts.reward is not None
    }
    asked = Counter(event.uid for event in lineage.shown)
    for event in lineage.shown:
        source, other = puts.get(event.uid), puts.get(event.success[0])
        same = source is not None and other is not None and source.source == other.source != 0
        if (*event.success, event.payload) not in finished or not same or asked[event.uid] > 1:
            report.faults.append(
                f"step {event.step}: the demonstration for uid {event.uid} is not a success of the "
                "same prompt, shown once"
            )


def _payloads(stored: list[AnyEvent]) -> dict[tuple[int, int], events.Ref]:
    """(uid, index) -> where its last trajectory lies: nothing is finished after it was trained."""
    finished = [event for event in stored if isinstance(event, events.Finished)]
    return {(event.uid, event.index): event.payload for event in finished}


def _samples(
    group: events.Taken, journal: Journal, payloads: dict[tuple[int, int], events.Ref]
) -> list[TrainingSample]:
    """The group's samples, from the segments."""
    return [
        TrainingSample(
            trajectory=journal.read(payloads[group.uid, d.index], Trajectory),
            trained=d.trained,
            stale_prefix=d.stale_prefix,
            drop_reason=d.drop_reason,
        )
        for d in group.decisions
    ]

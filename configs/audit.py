"""`slipstream audit`: every prompt the seeded stream issued is trained, dropped or open."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..buffer.audit import AuditReport, audit
from ..buffer.errors import CorruptData
from ..buffer.events import Put
from ..buffer.journal import Journal
from ..buffer.records import Ticket
from ..rollout.prompts import PromptSource
from .run_dir import read_experiment


@dataclass(frozen=True, slots=True)
class RunAudit:
    """What was counted, with the prompts that are not those of the stream."""

    report: AuditReport

    @property
    def ok(self) -> bool:
        """Whether everything adds up."""
        return self.report.ok

    @property
    def line(self) -> str:
        """The equation, or the first thing that is wrong with it."""
        return self.report.lines()[0] if self.ok else self.report.faults[0]

    @property
    def text(self) -> str:
        """The whole report."""
        return "\n".join(self.report.lines())


def audit_run(run_dir: Path) -> RunAudit:
    """Regenerate the run's prompt stream and hold its ledger against it.

    Raises:
        ConfigError: the folder holds no run, or its prompts cannot be opened any more.
        CorruptData: there is no ledger to audit.
    """
    experiment = read_experiment(run_dir)
    source = PromptSource(experiment.prompts, experiment.seed)
    foreign = list(_foreign_prompts(run_dir, source))
    uids = range(_issued(run_dir))
    law = experiment.buffer
    report = audit(
        run_dir,
        uids,
        max_staleness_steps=law.max_staleness_steps,
        max_uses=law.max_uses,
    )
    report.faults += [f"prompt {uid} is not the one the stream gives" for uid in foreign]
    return RunAudit(report)


def _issued(run_dir: Path) -> int:
    """How many prompts the ledger has been given: uids are put in order, each once."""
    journal = Journal(run_dir, writable=False)
    try:
        return sum(kind == "put" for _, _, kind, _, _ in journal.rows())
    finally:
        journal.close()


def _foreign_prompts(run_dir: Path, source: PromptSource) -> Iterator[int]:
    """Yield the uids whose stored prompt differs from the regenerated one, or is unreadable."""
    journal = Journal(run_dir, writable=False)
    try:
        for event in journal.events():
            if not isinstance(event, Put):
                continue
            try:
                stored = journal.read(event.ticket, Ticket).prompt
            except CorruptData:
                yield event.uid
                continue
            if stored.messages != source.prompt(event.uid).messages:
                yield event.uid
    finally:
        journal.close()

"""`slipstream audit`: every prompt the seeded stream issued is trained, dropped or open."""

from collections.abc import Iterator
from pathlib import Path

from ..buffer.audit import AuditReport, audit
from ..buffer.errors import CorruptData
from ..buffer.events import Put
from ..buffer.journal import Journal
from ..buffer.records import Ticket
from ..rollout.prompts import PromptSource
from .run_dir import read_experiment


def audit_run(run_dir: Path) -> AuditReport:
    """Regenerate the run's prompt stream and hold its ledger against it.

    Raises:
        ConfigError: the folder holds no run, or its prompts cannot be opened any more.
        CorruptData: there is no ledger to audit.
    """
    experiment = read_experiment(run_dir)
    source = PromptSource(experiment.prompts, experiment.seed)
    journal = Journal(run_dir, writable=False)
    try:
        until = journal.sequence  # a run that is alive goes on
        issued = [event for event in journal.events(until=until) if isinstance(event, Put)]
        foreign = list(_foreign_prompts(journal, issued, source))
    finally:
        journal.close()
    # Uids are put in order, each once: so many prompts must be accounted for.
    law = experiment.buffer
    report = audit(
        run_dir,
        range(len(issued)),
        max_staleness_steps=law.max_staleness_steps,
        max_uses=law.max_uses,
        until=until,
    )
    report.faults += [f"prompt {uid} is not the one the stream gives" for uid in foreign]
    return report


def _foreign_prompts(journal: Journal, issued: list[Put], source: PromptSource) -> Iterator[int]:
    """Yield the uids whose stored prompt differs from the regenerated one, or is unreadable."""
    for event in issued:
        try:
            stored = journal.read(event.ticket, Ticket).prompt
        except CorruptData:
            yield event.uid
            continue
        level = source.level_of(event.uid, stored.source_id)
        if stored.messages != source.prompt(event.uid, level).messages:
            yield event.uid

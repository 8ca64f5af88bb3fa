"""`slipstream show RUN --prompt UID`: why a prompt got its samples, and what became of them."""

from collections.abc import Iterator
from pathlib import Path

from ..buffer import events
from ..buffer.errors import ConfigError, CorruptData
from ..buffer.events import AnyEvent, Facts
from ..buffer.journal import Journal
from ..buffer.records import Ticket


def why(run_dir: Path, uid: int) -> str:
    """The sizing decisions of one prompt in words, from the ledger.

    Raises:
        ConfigError: no run, or the prompt was not put yet.
    """
    try:
        journal = Journal(run_dir.expanduser().absolute(), writable=False)
    except CorruptData as error:
        raise ConfigError(f"{error}; has the run started?") from None
    try:
        found = [event for event in journal.events() if getattr(event, "uid", None) == uid]
        put = next((event for event in found if isinstance(event, events.Put)), None)
        if put is None:
            raise ConfigError(f"{run_dir} has not put a prompt {uid} yet")
        sized = [put, *(event for event in found if isinstance(event, events.Extended))]
        # Ended without a word of its sizer, a group is `Extended` by what it was put with.
        refs = list(dict.fromkeys(event.ticket for event in sized))
        tickets = [journal.read(ref, Ticket) for ref in refs]
    finally:
        journal.close()
    decisions = [line for ticket in tickets for line in _decision(ticket)]
    return "\n".join([*decisions, *_outcome(found)])


def _decision(ticket: Ticket) -> Iterator[str]:
    """Yield what was decided, and why."""
    prompt, sizing = ticket.prompt, ticket.sizing
    samples = f"{sizing.num_samples} samples of at most {sizing.max_new_tokens} tokens"
    if not sizing.num_samples:
        samples = "no samples this time"
    if sizing.staged:
        samples += " for a start"
    elif sizing.stages:
        samples += " in all"
    yield (
        f"prompt {prompt.uid} ({prompt.source_id}, epoch {prompt.epoch}): {sizing.sizer} gave it "
        f"{samples}, weight {sizing.weight:g}"
    )
    yield f"because: {sizing.reason}"


def _outcome(found: list[AnyEvent]) -> Iterator[str]:
    """Yield what was seen since."""
    seen: dict[int, Facts] = {e.index: e.facts for e in found if isinstance(e, events.Finished)}
    rewards = [facts.reward for facts in seen.values() if facts.reward is not None]
    if rewards:
        tokens = sum(facts.num_tokens for facts in seen.values())
        yield (
            f"since then: {len(seen)} samples, mean reward {sum(rewards) / len(rewards):.3g}, "
            f"{tokens:,} tokens"
        )
    for event in found:
        if isinstance(event, events.Taken):
            yield f"taken by step {event.step}"
        elif isinstance(event, events.Dropped):
            why = f" ({event.detail})" if event.detail else ""
            yield f"dropped before step {event.step}: {event.reason}{why}"

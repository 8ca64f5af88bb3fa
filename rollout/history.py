"""What a run has seen of each prompt, as a fold over the buffer's journal.

The journal alone owns it: a `History` is rebuilt by folding all events, or from its stored copy and
the events after it, to the same bits (the same float operations in the same order). Evidence loses
half its weight every `half_life_steps` versions, because the policy that made it is gone. Evidence
of steps that a resume undid stays: those samples were drawn from this run's policies, too.
"""

import math
import os
from collections.abc import Callable, Set
from pathlib import Path

import msgspec
import xxhash

from ..buffer import events
from ..buffer.errors import CorruptData
from ..buffer.events import AnyEvent, Ref
from ..buffer.journal import Journal
from ..buffer.records import SizingDecision, Ticket

FILE = "sizing.state"
FORGET = "sizing.forget"
"""Put into the run folder by whoever wants the history to start again from priors."""
_MAGIC = b"slipstream sizing 1\n"
_BINS_PER_OCTAVE = 4
"""Resolution of the length histogram: an edge is 19% above the one before."""


class Evidence(msgspec.Struct):
    """Sums over the samples of one prompt (or of a whole task), each weighted by its age."""

    passes: float = 0.0
    """Sum of rewards, cut to [0, 1]: of a graded reward the mean is what is estimated."""
    fails: float = 0.0
    samples: float = 0.0
    """Those without a reward included."""
    tokens: float = 0.0
    score_norm: float = 0.0
    """Sum of `Facts.score_norm`, the proxy of the squared gradient norm G^2."""
    lengths: dict[int, float] = {}
    """Histogram of lengths: bin -> weight."""
    last_step: int = 0
    """The newest version that wrote one of them; the sums are as of then."""

    def faded(self, step: int, half_life_steps: float) -> float:
        """The weight that the sums have left at a step."""
        return 0.5 ** (max(0, step - self.last_step) / half_life_steps)

    def add(self, facts: events.Facts, step: int, half_life_steps: float) -> None:
        """Count one sample, written by version `step`."""
        if step > self.last_step:
            weight = self.faded(step, half_life_steps)
            for name in ("passes", "fails", "samples", "tokens", "score_norm"):
                setattr(self, name, getattr(self, name) * weight)
            self.lengths = {edge: value * weight for edge, value in self.lengths.items()}
            self.last_step = step
        if facts.reward is not None:
            passed = min(1.0, max(0.0, facts.reward))
            self.passes += passed
            self.fails += 1.0 - passed
        self.samples += 1.0
        self.tokens += facts.num_tokens
        self.score_norm += facts.score_norm
        place = _bin_of(facts.num_tokens)
        self.lengths[place] = self.lengths.get(place, 0.0) + 1.0


def _bin_of(num_tokens: int) -> int:
    return math.ceil(_BINS_PER_OCTAVE * math.log2(max(1, num_tokens)))


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What a sizer is told of one prompt: the posterior as of now, its task's evidence as prior."""

    source_id: str
    passes: float
    fails: float
    """Pass rate ~ Beta(passes, fails)."""
    evidence: float
    """How many samples of this very prompt that is worth today."""
    tokens: float
    """Expected length of a sample."""
    score_norm: float
    """Expected squared gradient norm of a sample, G^2."""
    last_step: int | None
    """Version of its newest sample; None: never seen."""
    skips: int = 0
    """Visits in a row at which it was skipped."""
    unseen_spread: float = 1.0 / 6.0
    """`spread` of a prompt of the task before anything was seen of it."""

    @property
    def pass_rate(self) -> float:
        """Mean of the posterior."""
        return self.passes / (self.passes + self.fails)

    @property
    def spread(self) -> float:
        """E p(1 - p) under the posterior."""
        total = self.passes + self.fails
        return self.passes * self.fails / (total * (total + 1.0))


class Probe(msgspec.Struct):
    """A group whose first stage is out."""

    source_id: str
    sizing: SizingDecision
    open: list[int]
    """Its samples that are not finished, in order."""
    known: Known | None = None
    """The posterior at the moment the last one was: a function of the ledger alone, so that whoever
    decides, and decides again, decides the same."""


class _Body(msgspec.Struct):
    """What is stored; `half_life_steps` because sums under another one are other sums."""

    half_life_steps: float
    sequence: int
    step: int
    prompts: dict[str, Evidence]
    tasks: dict[str, Evidence]
    issued: dict[int, str]
    """uid -> source of the prompts whose samples may still finish."""
    ended: list[int]
    """uids taken or dropped since the last checkpoint."""
    skips: dict[str, int]
    probes: dict[int, Probe] = {}
    """uid -> groups whose next stage is not decided."""


class History:
    """Evidence by prompt and by task. Trace:

    apply(Put 7)                     prompt 7 is source "sum/3"
    apply(Finished 7, reward 1)      "sum/3" and "sum" have one pass more
    apply(Put 9, no samples)         "sum/3" again, skipped: skips 1
    apply(Put 10, 2 samples, staged) a probe: two samples open
    apply(Finished 10) twice         `probed` has it, until apply(Extended 10)
    """

    def __init__(self, half_life_steps: float, prior_strength: float) -> None:
        """Start from priors.

        Args:
            half_life_steps: versions after which a sample counts half.
            prior_strength: samples that the task's pass rate is worth as prior of a prompt.
        """
        self._prior = prior_strength
        self._now = _Body(half_life_steps, 0, 0, {}, {}, {}, [], {})

    @property
    def sequence(self) -> int:
        """The journal's event that was folded last."""
        return self._now.sequence

    @property
    def step(self) -> int:
        """Of the newest version."""
        return self._now.step

    def catch_up(self, journal: Journal) -> None:
        """Fold the events that a journal has gained."""

        def ticket(ref: Ref) -> Ticket | None:
            try:
                return journal.read(ref, Ticket)
            except CorruptData:  # quarantined, or removed above `buffer.keep_rollouts_gb`
                return None

        for event in journal.events(after=self.sequence):
            self.apply(self.sequence + 1, event, ticket)

    def apply(self, sequence: int, event: AnyEvent, ticket: Callable[[Ref], Ticket | None]) -> None:
        """Fold one event in.

        Args:
            sequence: its number in the journal.
            event: the next one.
            ticket: reads a stored ticket; None when it is unreadable.
        """
        now, now.sequence = self._now, sequence
        match event:
            case events.Put():
                self._put(event, ticket(event.ticket))
            case events.Finished() if event.uid in now.issued:
                self._finished(event, now.issued[event.uid])
                self._probe_changed(event.uid, finished={event.index})
            case events.Returned():
                self._probe_changed(event.uid, returned=set(event.indices))
            case events.Voided():
                self._probe_changed(event.uid, finished=set(event.indices))
            case events.Extended() if not event.staged:
                now.probes.pop(event.uid, None)
            case events.Published(manifest=manifest):
                now.step = manifest.version.step
            case events.Taken() | events.Dropped():
                now.ended.append(event.uid)
                now.probes.pop(event.uid, None)
            case events.BranchOpened():
                now.step = event.resumed_at
                now.ended.clear()  # what is undone may be finished again
            case events.Checkpointed():
                for uid in now.ended:
                    now.issued.pop(uid, None)
                now.ended.clear()
            case _:
                pass

    def _put(self, event: events.Put, ticket: Ticket | None) -> None:
        if ticket is None:
            return
        source_id = ticket.prompt.source_id
        if event.num_samples:
            self._now.issued[event.uid] = source_id
            self._now.skips.pop(source_id, None)
            if ticket.sizing.staged:
                indices = list(range(event.num_samples))
                self._now.probes[event.uid] = Probe(source_id, ticket.sizing, indices)
        else:
            self._now.skips[source_id] = self._now.skips.get(source_id, 0) + 1

    def _finished(self, event: events.Finished, source_id: str) -> None:
        now = self._now
        spans = event.facts.spans
        step = spans[-1][1] if spans else now.step
        for table, key in ((now.prompts, source_id), (now.tasks, _task(source_id))):
            table.setdefault(key, Evidence()).add(event.facts, step, now.half_life_steps)

    def _probe_changed(
        self, uid: int, finished: Set[int] = frozenset(), returned: Set[int] = frozenset()
    ) -> None:
        probe = self._now.probes.get(uid)
        if probe is None:
            return
        probe.open = sorted((returned | set(probe.open)) - finished)
        complete = not probe.open
        budget = probe.sizing.max_new_tokens
        probe.known = self.known(probe.source_id, budget) if complete else None

    @property
    def probed(self) -> list[tuple[int, SizingDecision, Known]]:
        """(uid, its decision, what is known) of the groups whose next stage can be decided."""
        return [
            (uid, probe.sizing, probe.known)
            for uid, probe in self._now.probes.items()
            if probe.known is not None
        ]

    def known(self, source_id: str, max_new_tokens: int) -> Known:
        """The posterior of one prompt at the newest version.

        Args:
            source_id: of the prompt.
            max_new_tokens: what a sample is expected to cost while nothing has been seen.
        """
        now, nothing = self._now, Evidence()
        task, own = now.tasks.get(_task(source_id), nothing), now.prompts.get(source_id, nothing)
        weight = own.faded(now.step, now.half_life_steps)
        seen = task.faded(now.step, now.half_life_steps)
        share = (task.passes * seen + 1.0) / ((task.passes + task.fails) * seen + 2.0)

        def mean(name: str, unseen: float) -> float:
            general = getattr(task, name) / task.samples if task.samples else unseen
            total = getattr(own, name) * weight + general * self._prior
            return total / (own.samples * weight + self._prior)

        return Known(
            source_id=source_id,
            passes=own.passes * weight + share * self._prior,
            fails=own.fails * weight + (1.0 - share) * self._prior,
            evidence=own.samples * weight,
            tokens=max(1.0, mean("tokens", max_new_tokens)),
            score_norm=mean("score_norm", 1.0),
            last_step=own.last_step if own.samples else None,
            skips=now.skips.get(source_id, 0),
            unseen_spread=share * (1.0 - share) * self._prior / (self._prior + 1.0),
        )

    def pass_rate(self, task: str) -> tuple[float, float]:
        """Mean pass rate of a task, or level, under a uniform prior, and the samples behind it."""
        now = self._now
        seen = now.tasks.get(task, Evidence())
        weight = seen.faded(now.step, now.half_life_steps)
        passes, fails = seen.passes * weight, seen.fails * weight
        return (passes + 1.0) / (passes + fails + 2.0), seen.samples * weight

    def length_quantile(self, source_id: str, quantile: float) -> int | None:
        """A length that so large a share of the task's samples does not exceed (rounded up to the
        next bin's edge), or of the prompt's own when those reach further; None: nothing seen."""
        found = [
            _quantile(table[key].lengths, quantile)
            for table, key in ((self._now.prompts, source_id), (self._now.tasks, _task(source_id)))
            if key in table
        ]
        return max(found, default=None)

    def dump(self) -> bytes:
        """Everything, equal bytes for equal histories."""
        return msgspec.msgpack.encode(self._now)

    def save(self, folder: Path) -> None:
        """Replace the stored copy, atomically and durably."""
        body, path = self.dump(), folder / FILE
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(_MAGIC + xxhash.xxh3_128_digest(body) + body)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def open(self, folder: Path, sequence: int) -> None:
        """Go on from the stored copy, when there is one of this half-life; or start from priors,
        when a file `FORGET` asks for it: then of prompts in flight nothing is learnt any more.

        Args:
            folder: of the run.
            sequence: the journal's last; what comes before is what is forgotten.
        Raises:
            CorruptData: the copy's bytes are not those written.
        """
        if (folder / FORGET).exists():
            self._now.sequence = sequence
            self.save(folder)
            (folder / FORGET).unlink()
        elif (folder / FILE).exists():
            stored = _read(folder / FILE)
            # In a copy of the run the stored history may have seen more than the ledger.
            if stored.sequence <= sequence and (
                stored.half_life_steps == self._now.half_life_steps
            ):
                self._now = stored


def _read(path: Path) -> _Body:
    raw = path.read_bytes()
    start = len(_MAGIC) + 16
    try:
        if raw[:start] != _MAGIC + xxhash.xxh3_128_digest(raw[start:]):
            raise ValueError("its digest does not match")
        return msgspec.msgpack.decode(raw[start:], type=_Body)
    except ValueError as error:
        raise CorruptData(
            f"{path} is not what was written ({error}). Delete it, and `slipstream resume` "
            f"rebuilds it from the ledger; to start from priors instead, make a file {FORGET} "
            "beside it"
        ) from error


def _task(source_id: str) -> str:
    """The task that `task/index` belongs to."""
    return source_id.rpartition("/")[0]


def _quantile(lengths: dict[int, float], quantile: float) -> int:
    wanted, seen = quantile * sum(lengths.values()), 0.0
    for place in sorted(lengths):
        seen += lengths[place]
        if seen >= wanted:
            return math.ceil(2 ** (place / _BINS_PER_OCTAVE))
    return math.ceil(2 ** (max(lengths) / _BINS_PER_OCTAVE))

"""What processes say to the buffer service: one request type per verb, one reply type each.

A request that waits names its patience in `wait_s`; the service answers at the latest then, and a
client that hears nothing for longer raises `PeerLost`. Every request is idempotent: repeating it
after a lost reply changes nothing and returns the same answer.
"""

import msgspec

from .records import (
    DropReason,
    Prompt,
    Record,
    SamplingParams,
    Score,
    SizingDecision,
    Ticket,
    Trajectory,
    TrajectoryGroup,
    Version,
    WeightsManifest,
)

SCHEMA_VERSION = 3
"""First element of every message; another number is refused with both numbers in the reason."""


class Hello(Record, tag=True):
    """A process introduces itself; it is refused when it belongs to another run."""

    run_id: str
    name: str
    """`worker-0`, `feeder`, `learner`, `supervisor`."""
    pid: int
    """0: said by the supervisor of a process that was lost with its node."""


class PutPrompts(Record, tag=True):
    """Put WAITING prompts, in uid order; waits while the queue is full."""

    tickets: tuple[Ticket, ...]
    wait_s: float = 0.0


class ExtendGroup(Record, tag=True):
    """Size an open group again; `sizing.num_samples` is the new total, never less than before."""

    uid: int
    sizing: SizingDecision


class ClaimSamples(Record, tag=True):
    """Ask for work; granted only while the law admits it."""

    worker: str
    serving: Version
    """The version the engine serves now."""
    max_samples: int
    request_id: str
    wait_s: float = 0.0


class FinishSamples(Record, tag=True):
    """Hand in trajectories, acknowledged when durable; what one is refused for does not touch the
    others."""

    trajectories: tuple[Trajectory, ...]
    lease_ids: tuple[str, ...]


class ReleaseSamples(Record, tag=True):
    """Give samples back unfinished (an engine that stops) or report them as impossible."""

    uid: int
    attempt: int
    indices: tuple[int, ...]
    lease_id: str
    reason: DropReason
    detail: str = ""
    death: str = ""
    """Names the death of the engine that cut them off, if that is why; see `Replay.deaths`."""


class Heartbeat(Record, tag=True):
    """Keep a worker's leases alive, and say what its engine serves (also the stats for display)."""

    worker: str
    serving: Version | None
    stats: dict[str, float] = {}


class TakeGroups(Record, tag=True):
    """Ask for the batch of one learner step; the same `request_id` gets the same batch."""

    step: int
    request_id: str
    wait_s: float
    received: int | None = None
    """Groups of the batch that the asker has: it wants what comes after them, in parts as groups
    become READY. None: the whole batch at once."""


class PublishVersion(Record, tag=True):
    """Announce new weights; `manifest.version` must extend the live branch."""

    manifest: WeightsManifest


class AwaitVersion(Record, tag=True):
    """The newest manifest, as soon as it is newer than `after`."""

    after: Version | None = None
    wait_s: float = 0.0


class CheckpointSaved(Record, tag=True):
    """Groups taken at or below this step are TRAINED for good."""

    version: Version
    resumable_step: int = 0
    """The oldest checkpoint from which a resume may still start; what only older ones need may be
    removed."""


class PutEvaluation(Record, tag=True):
    """Score these prompts at one pinned version; outside the states, the law and the audit."""

    job_id: str
    version: Version
    prompts: tuple[Prompt, ...]
    samples_per_prompt: int
    sampling: SamplingParams


class FinishEvaluation(Record, tag=True):
    """One scored held-out sample."""

    job_id: str
    uid: int
    index: int
    text: str
    score: Score
    num_tokens: int


class AwaitEvaluation(Record, tag=True):
    """The job's results, once complete."""

    job_id: str
    wait_s: float


class GetStats(Record, tag=True):
    """Counts, ages, lags and waits, for displays."""


class CloseRun(Record, tag=True):
    """No more claims are granted; workers learn it from their next reply and end."""

    reason: str


Request = (
    Hello
    | PutPrompts
    | ExtendGroup
    | ClaimSamples
    | FinishSamples
    | ReleaseSamples
    | Heartbeat
    | TakeGroups
    | PublishVersion
    | AwaitVersion
    | CheckpointSaved
    | PutEvaluation
    | FinishEvaluation
    | AwaitEvaluation
    | GetStats
    | CloseRun
)


class Welcome(Record, tag=True):
    """Answer to `Hello`."""

    run_id: str
    branch: int
    next_uid: int
    """The first uid of the stream that the journal has not issued: the feeder starts here."""


class Accepted(Record, tag=True):
    """Answer to `PutPrompts`: how many of the tickets were put (a prefix of them)."""

    count: int
    closing: bool = False


class Claim(Record):
    """Some samples of one attempt, leased to one worker."""

    lease_id: str
    ticket: Ticket
    attempt: int
    indices: tuple[int, ...]
    lease_s: float
    """Seconds without a heartbeat after which the samples are issued to somebody else."""


class EvaluationClaim(Record):
    """Samples of one held-out prompt, to be generated under exactly this version."""

    job_id: str
    manifest: WeightsManifest
    prompt: Prompt
    indices: tuple[int, ...]
    sampling: SamplingParams


class Claims(Record, tag=True):
    """Answer to `ClaimSamples`; both empty when there is nothing to do within `wait_s`."""

    claims: tuple[Claim, ...] = ()
    evaluations: tuple[EvaluationClaim, ...] = ()
    newest: WeightsManifest | None = None
    closing: bool = False


class ProofLine(Record):
    """What the law says of one step's batch; recomputed by the learner from what it trained."""

    step: int
    bound: int
    max_lag: int
    violations: int
    """Tokens with weight and a lag outside [0, bound]; anything but 0 is our bug."""
    orphaned_tokens: int
    lag_counts: dict[int, int]
    """Trained tokens by lag."""
    trained_tokens: int
    trimmed_tokens: int
    mixed_trajectories: int
    """Trajectories with gradient that hold two versions or more."""
    trained_trajectories: int
    dropped: dict[str, int]
    """Trajectories dropped since the last batch, by reason."""
    length_bias: float
    """Mean length of the trajectories trained over that of all issued and finished so far
    (1.0: no bias)."""
    finished_samples: int = 0
    """Samples with a reward finished since the last batch, those dropped since included."""
    finished_reward_mean: float | None = None
    """Their mean reward; None without any. Unlike that of the batch it is not biased by drops."""


class Batch(Record, tag=True):
    """Answer to `TakeGroups`: the groups of the step (those after the parts received), ordered by
    uid, durable as TAKEN, with the proof line of the whole step."""

    step: int
    groups: tuple[TrajectoryGroup, ...]
    proof: ProofLine
    journal_sequence: int
    demonstrations: tuple[Trajectory, ...] = ()
    """Earlier successes of prompts that had none lately; outside the law and the books."""
    drafts: dict[str, float] = {}
    """What speculation did so far, for the metrics; empty without it."""


class Part(Record, tag=True):
    """Answer to `TakeGroups` that names what it has `received`: groups of the step, durable as
    TAKEN; more follow, the last of them in a `Batch`."""

    step: int
    groups: tuple[TrajectoryGroup, ...]


class NotYet(Record, tag=True):
    """The wait ended first; `waiting_on` says in words on whom."""

    waiting_on: str
    closing: bool = False


class Newest(Record, tag=True):
    """Answer to `AwaitVersion`."""

    manifest: WeightsManifest | None
    closing: bool = False


class EvaluationResults(Record, tag=True):
    """Answer to `AwaitEvaluation`: one entry per sample, ordered by (uid, index)."""

    job_id: str
    version: Version
    results: tuple[FinishEvaluation, ...]


class Stats(Record, tag=True):
    """Answer to `GetStats`."""

    counts: dict[str, int]
    """Groups by lifecycle word."""
    dropped: dict[str, int]
    newest: Version | None
    lags: dict[int, int]
    """READY groups by the lag of their oldest token against the next step."""
    oldest_inflight_s: float
    capacity_groups: int
    """What the law admits at the newest version; INFLIGHT + READY + TAKEN stays below it."""
    workers: dict[str, dict[str, float]]
    waits: list[str]
    evaluation: str = ""
    quarantined: dict[int, str] = {}
    """uid -> why, of the prompts that were found to be poisoned."""


class Done(Record, tag=True):
    """The request was carried out (and is durable, where that is promised)."""

    journal_sequence: int = 0
    refused: dict[int, str] = {}
    """Position in a `FinishSamples` -> why that one was refused."""
    held: tuple[Version, ...] = ()
    """Answer to `PublishVersion`: the versions that engines may still ask for."""


class RefusedReply(Record, tag=True):
    """The request was refused; the client raises `Refused` with this reason."""

    reason: str


Reply = (
    Welcome
    | Accepted
    | Claims
    | Batch
    | Part
    | NotYet
    | Newest
    | EvaluationResults
    | Stats
    | Done
    | RefusedReply
)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Around every message: schema first, then the number that pairs a reply with its request."""

    schema: int
    request_number: int
    body: msgspec.Raw

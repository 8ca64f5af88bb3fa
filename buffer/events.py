"""What the ledger records: one small event per transition, and nothing that another one implies.

The state of the buffer is the fold of these events (`state.State.apply`), live and after a restart
alike. Big things (tickets, trajectories) lie in segments; an event holds where. Encoded as arrays,
so that the usual event stays below 200 bytes.
"""

from typing import Any

import msgspec

from .messages import ProofLine
from .records import DropReason, WeightsManifest


class Event(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """Base: positional on disk, keyword in code. Nothing in one refers back to it, so that the
    garbage collector may leave out what a long run has millions of."""


class Ref(Event, frozen=True):
    """Where a payload lies."""

    segment: int
    offset: int
    length: int
    digest: int
    """xxh3-64 of the payload."""


class Facts(Event, frozen=True):
    """What transitions need to know of a trajectory without opening it."""

    spans: tuple[tuple[int, int, int], ...]
    """(branch, step, number of tokens), as `Trajectory.versions`."""
    reward: float | None
    """None unless the reward scored it."""
    score_norm: float = 0.0
    """Sum of 1 - probability over the tokens. For a softmax, E |d log pi / d logits|^2 at a token
    is 1 - sum of squared probabilities = E[1 - probability], and scores of successive tokens are
    uncorrelated: an unbiased, backward-free proxy of the sample's squared gradient norm."""

    @property
    def num_tokens(self) -> int:
        """N, the tokens the policy wrote."""
        if len(self.spans) == 1:  # nearly always, and asked at every fold
            return self.spans[0][2]
        return sum([length for _, _, length in self.spans])


class Decision(Event, frozen=True):
    """What `take` decided of one sample; the fields of `TrainingSample`."""

    index: int
    trained: bool
    stale_prefix: int = 0
    drop_reason: DropReason | None = None


class Put(Event, frozen=True, tag="put"):
    """A prompt is WAITING."""

    uid: int
    num_samples: int
    ticket: Ref
    task: str = ""
    staged: bool = False
    """As `SizingDecision.staged`."""
    source: int = 0
    """xxh3-64 of the prompt's `source_id`, when a success of it is of use to a later group."""


class Extended(Event, frozen=True, tag="extend"):
    """An open group was sized again: so many samples in all, the new ones WAITING."""

    uid: int
    num_samples: int
    ticket: Ref
    staged: bool = False


class Claimed(Event, frozen=True, tag="claim"):
    """Samples are INFLIGHT at a worker, which serves version (branch, step)."""

    uid: int
    attempt: int
    indices: tuple[int, ...]
    lease_id: str
    worker: str
    branch: int
    step: int
    request_id: str


class Finished(Event, frozen=True, tag="finish"):
    """A sample is READY; its group is when all its samples are."""

    uid: int
    index: int
    payload: Ref
    facts: Facts


class Returned(Event, frozen=True, tag="return"):
    """Samples are WAITING again, each under this attempt; siblings stay. A group of which nothing
    is left is WAITING."""

    uid: int
    indices: tuple[int, ...]
    attempt: int
    reason: str
    """A drop reason that issues again, `resumed` (in flight at a crash) or `lost` (its payload)."""


class Voided(Event, frozen=True, tag="void"):
    """Samples that cannot be made; the group goes on without them."""

    uid: int
    indices: tuple[int, ...]
    reason: DropReason
    step: int
    """The step during which it happened: the next one to be taken."""


class Dropped(Event, frozen=True, tag="drop"):
    """The prompt is DROPPED for good (in this lineage)."""

    uid: int
    reason: DropReason
    step: int
    """As in `Voided`; resuming from an earlier step undoes the drop."""
    detail: str = ""
    """Of a `quarantined` prompt: what was found."""


class Reopened(Event, frozen=True, tag="reopen"):
    """The whole attempt is dropped and the prompt WAITING as the next one."""

    uid: int
    attempt: int
    reason: DropReason


class Taken(Event, frozen=True, tag="take"):
    """A group is TAKEN by a step of the live branch."""

    uid: int
    step: int
    decisions: tuple[Decision, ...]


class Demonstrated(Event, frozen=True, tag="show"):
    """A step trains an earlier success of a prompt whose group had none; outside the law."""

    uid: int
    """Of the group without a success."""
    step: int
    success: tuple[int, int]
    """(uid, index) of the sample that is shown."""
    payload: Ref


class StepBegun(Event, frozen=True, tag="begin"):
    """The first part of a step's batch is TAKEN; a request alone gets the others."""

    step: int
    request_id: str


class StepTaken(Event, frozen=True, tag="step"):
    """The batch of a step is complete; written in one transaction with its `Taken` events."""

    step: int
    request_id: str
    proof: ProofLine


class Published(Event, frozen=True, tag="publish"):
    """New weights."""

    manifest: WeightsManifest


class Checkpointed(Event, frozen=True, tag="checkpoint"):
    """Groups TAKEN at or below this step are TRAINED."""

    step: int


class BranchOpened(Event, frozen=True, tag="branch"):
    """The run goes on as a new branch; what lies off its path is undone."""

    branch: int
    parents: dict[int, tuple[int, int]]
    resumed_at: int
    """The step of the checkpoint it starts from; 0 for a fresh run."""


class Compacted(Event, frozen=True, tag="compact"):
    """Segments below this one are removed: no checkpoint from `step` on can need them."""

    first_segment: int
    step: int


AnyEvent = (
    Put
    | Extended
    | Claimed
    | Finished
    | Returned
    | Voided
    | Dropped
    | Reopened
    | Taken
    | Demonstrated
    | StepBegun
    | StepTaken
    | Published
    | Checkpointed
    | BranchOpened
    | Compacted
)


def encode_event(event: AnyEvent) -> bytes:
    """Bytes for the ledger."""
    return msgspec.msgpack.encode(event)


decode_event = msgspec.msgpack.Decoder(AnyEvent).decode
"""The reverse; raises msgspec.ValidationError when the row is not an event."""


def columns(event: AnyEvent) -> tuple[str, int | None, int | None]:
    """(kind, uid, step) of an event: columns, so that a person can ask the ledger with SQL."""
    kind: Any = type(event).__struct_config__.tag
    return kind, getattr(event, "uid", None), getattr(event, "step", None)

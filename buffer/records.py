"""The records that cross between rollout, buffer and learner: one per stage, immutable.

Shape suffixes: L tokens of a whole trajectory (prompt included), N tokens the policy wrote.
Arrays are numpy so that this module, and every process without a model, runs without torch.
"""

from typing import Any, Literal, dataclass_transform

import msgspec
import numpy as np

FinishReason = Literal["stop", "length", "abort"]
"""`stop`: an end token or stop string; `length`: the token budget; `abort`: cut off by us."""

ScoreStatus = Literal["scored", "reward_failed", "infrastructure_failed"]
"""`reward_failed`: the reward raised, hung or returned NaN on this sample (data);
`infrastructure_failed`: its process was lost for a reason of ours. Neither is a reward of 0."""

DropReason = Literal[
    "stale", "expired", "orphaned", "no_signal", "reward_failed", "quarantined", "skipped", "cut"
]
"""`stale`, `expired` and `orphaned` issue the prompt again; the others are final. `skipped`: sized
at no samples when it was put. `cut`: a spare sample that its group did not wait for."""

REISSUED: frozenset[DropReason] = frozenset({"stale", "expired", "orphaned"})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class _RecordMeta(type(msgspec.Struct)):
    """Tells type checkers that the subclasses are frozen and keyword-only, too."""


class Record(
    msgspec.Struct, metaclass=_RecordMeta, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Base of the records: immutable, slotted, keyword-only, and strict when decoded."""


class Version(Record, order=True):
    """One state of the policy's weights. Ordered by (branch, step); compared with its digest."""

    branch: int
    """0 for a fresh run; each resume opens the next one."""
    step: int
    """The learner step that produced it; 0 is the policy before the first step."""
    digest: str = ""
    """xxh3-128 hex digest of the published tensors, in name order."""

    def __str__(self) -> str:
        return f"{self.branch}.{self.step}"


class VersionSpan(Record):
    """A run of consecutive policy-written tokens with one version."""

    version: Version
    length: int


class Message(Record):
    """One chat message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Prompt(Record):
    """One issue of one task item: what the policy is asked, and what the reward needs to know."""

    uid: int
    """Position in the run's seeded prompt stream; unique over epochs."""
    source_id: str
    """`task/index`: equal for the same item in every epoch."""
    task: str
    messages: tuple[Message, ...]
    payload: dict[str, Any] = {}
    """Plain data for the reward: the gold answer, dataset columns, metadata."""
    epoch: int = 0
    seed: int = 0


class SamplingParams(Record):
    """The sampling law of one request (temperature, then top-k, top-p, min-p; inverse CDF)."""

    temperature: float = 1.0
    """0 means greedy: evaluation only, refused for training."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all tokens."""
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit before all else); refused for training."""

    @property
    def truncates(self) -> bool:
        """Whether the law removes tokens from the distribution."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


class Stage(Record):
    """Samples of a group that were decided on together."""

    num_samples: int
    weight: float
    """Of their mean in the prompt's loss, under `aggregation = "prompt"`."""


class SizingDecision(Record):
    """How many samples a prompt gets and how long they may be, with the reason."""

    sizer: str
    num_samples: int
    """0: the prompt is skipped this time."""
    max_new_tokens: int
    reason: str
    staged: bool = False
    """More samples may follow: the finished group is neither trained nor dropped before
    `BufferClient.extend` has decided, or `buffer.straggler_wait_s` has passed."""
    weight: float = 1.0
    """Of the prompt in the loss, under `aggregation = "prompt"`."""
    stages: tuple[Stage, ...] = ()
    """Of a group that is sized in stages, in order of index; none: one stage of weight 1. A stage's
    baseline holds the samples of earlier stages, never of later ones."""
    spares: int = 0
    """Of its samples, those that finish last; they are cut when `spare_weight` is 0."""
    spare_weight: float = 1.0
    """Of a spare sample in the loss, and of each comparison with one: 1 over the probability with
    which the group waits for them, or 0."""


class Ticket(Record):
    """A prompt as the feeder puts it: WAITING, with its sizing decision."""

    prompt: Prompt
    sizing: SizingDecision


class Score(Record):
    """What the reward said of one completion."""

    value: float | None
    """None exactly when the status is not `scored`."""
    status: ScoreStatus = "scored"
    components: dict[str, float] = {}
    reason: str = ""
    """Why it failed, or what the reward wants shown."""


class Completion(Record):
    """What a reward sees."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason = "stop"
    turns: tuple[Message, ...] = ()


class Turn(Record):
    """One stretch of a conversation inside a trajectory: [start, end) token positions."""

    start: int
    end: int
    role: Literal["prompt", "policy", "observation"]
    state_hash: str = ""
    """Of the environment's state that a policy turn answered; "" when it has none."""
    reward: float = 0.0
    """What the environment gave for a policy turn."""


class Timings(Record):
    """Wall-clock seconds since the epoch."""

    claimed_s: float
    first_token_s: float
    generated_s: float
    scored_s: float


class RaggedArray(Record):
    """Per policy-written token, a variable number of values: token j owns
    `values[offsets[j]:offsets[j + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray
    """[N + 1] int64."""


class Trajectory(Record):
    """One sample of one attempt at a prompt, scored; carried unopened from worker to learner."""

    uid: int
    attempt: int
    index: int
    """Position in its group."""
    token_ids: np.ndarray
    """[L] int32: prompt, then what the policy wrote (and observations between turns)."""
    policy_mask: np.ndarray
    """[L] bool: True where the policy wrote the token; the others are never trained on."""
    behaviour_logprobs: np.ndarray
    """[N] float32 or float64: log-probability under the law that sampled the token."""
    versions: tuple[VersionSpan, ...]
    """Which version wrote each of the N tokens; lengths sum to N."""
    kv_version_min: tuple[VersionSpan, ...]
    """The oldest version among the keys each of the N tokens attended to; lengths sum to N."""
    sampling: SamplingParams
    finish_reason: FinishReason
    text: str
    score: Score
    turns: tuple[Turn, ...]
    timings: Timings
    engine_id: str
    extras: dict[str, RaggedArray] = {}
    """Named per-token arrays carried unopened. `kept_ids`: the kept set of each token, recorded
    under `ratio_law = "kept_set"`. `removed_mass`: one value per token, the probability that
    truncation removed. `routed_experts` is reserved for MoE router replay."""

    def __post_init__(self) -> None:
        """Check that the parts agree.

        Raises:
            ValueError: lengths differ, or spans do not cover the policy's tokens.
        """
        num_policy = int(np.count_nonzero(self.policy_mask))
        if self.policy_mask.shape != self.token_ids.shape or self.token_ids.ndim != 1:
            raise ValueError(
                f"policy_mask {self.policy_mask.shape} and token_ids {self.token_ids.shape} "
                "must be one-dimensional and of one length"
            )
        if self.behaviour_logprobs.shape != (num_policy,):
            raise ValueError(
                f"behaviour_logprobs {self.behaviour_logprobs.shape} must have one entry for each "
                f"of the {num_policy} tokens the policy wrote"
            )
        for name in ("versions", "kv_version_min"):
            lengths = [span.length for span in getattr(self, name)]
            if sum(lengths) != num_policy or min(lengths, default=0) < 0:
                raise ValueError(f"{name} covers {lengths} tokens of {num_policy}")

    @property
    def num_policy_tokens(self) -> int:
        """N."""
        return len(self.behaviour_logprobs)


class TrainingSample(Record):
    """A trajectory as the buffer hands it to the learner."""

    trajectory: Trajectory
    trained: bool
    """False: its reward counts in the group's baseline, but it carries no gradient."""
    stale_prefix: int = 0
    """The first so many policy-written tokens are over the bound: context, zero weight."""
    drop_reason: DropReason | None = None
    bound: int | None = None
    """The largest lag of its tokens when its task's is tighter than the run's."""


class TrajectoryGroup(Record):
    """All samples of one prompt's attempt, with the decision that made them."""

    prompt: Prompt
    attempt: int
    sizing: SizingDecision
    samples: tuple[TrainingSample, ...]
    """Ordered by `index`."""


class Shard(Record):
    """One file of published weights."""

    path: str
    """Absolute; safetensors."""
    num_bytes: int
    digest: str
    """xxh3-128 hex of the file's bytes."""
    holder: str = ""
    """Who serves it to hosts that do not see `path` (`weight_holder.Holder.address`); "": nobody,
    all of them do."""


class WeightsManifest(Record):
    """A published version and where its bytes are."""

    version: Version
    shards: tuple[Shard, ...]
    base: Shard | None = None
    """Of adapters: the weights they are merged onto (`kernels/adapters.py`), which all versions of
    a learner share."""

    @property
    def files(self) -> tuple[Shard, ...]:
        """All that it takes to load the version."""
        return self.shards if self.base is None else (self.base, *self.shards)

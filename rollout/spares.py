"""Spare samples (backup workers): a group is issued more than it needs, and does not wait for all.

Who finishes first is short, so training on the first alone pulls the update towards short answers.
Target gradient: w g all the same. Of M samples s are spare; C = 1, with probability e, when the
group waits for them, else 0, drawn before it is issued. The update is

    (w / M) sum over i of  b_i A_i grad log pi(y_i)
    A_i = (1 / (M - 1)) sum over j of  c_ij (r_i - r_j)

b_i = C / e for a spare sample, c_ij = C / e where i is needed and j spare, and 1 elsewhere. Proof:
let the M samples be given, each as it ends when nobody is cut. Which are needed, the first M - s to
finish, is settled before anything depends on C, so C is independent of all of it and E C / e = 1:
what is left is the leave-one-out update of the whole group, with the expectation w g. Nothing is
assumed of lengths, engines, clocks or of who generates what: a group that is not cut, because
several workers have a part of it, is weighed as if it were. One exception: a needed sample whose
reward process is lost is made again, and is then among the last; that happens to few. (Weights
1 / P(a sample of this length is kept) need the law of the lengths, and grow without bound at its
tail.)

Source: backup workers, Chen et al. (arXiv:1604.00981), who keep the bias; ending at random, with
weights of 1 / probability for what goes on, is Russian roulette (Kahn and Harris 1951).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from ..buffer.messages import Claim
from ..buffer.records import SizingDecision
from .config import SizingConfig
from .engine import GenerationOutput

LEAST_NEEDED = 2
"""A group of one sample has nothing to compare."""
_TICK_S = 1e-6
"""Apart in the stamps of samples: above the resolution of a clock that counts from 1970."""


def with_spares(decision: SizingDecision, config: SizingConfig, chance: float) -> SizingDecision:
    """A decision, with which of its samples are spare and whether they are waited for.

    Args:
        decision: its `num_samples` are what is issued, so that no budget is exceeded.
        config: `[rollout.sizing]`.
        chance: uniform in [0, 1), and independent of everything else.
    """
    spares = min(config.spare_samples, decision.num_samples - LEAST_NEEDED)
    if spares <= 0:
        return decision
    weight = 1.0 / config.wait_share if chance < config.wait_share else 0.0
    told = f"waited for, each counts {weight:.2f} times" if weight else "cut once the others are in"
    return msgspec.structs.replace(
        decision,
        spares=spares,
        spare_weight=weight,
        reason=f"{decision.reason}; {spares} spare, {told} (chance {chance:.2f})",
    )


@dataclass(slots=True)
class _Group:
    """What one worker has of a group."""

    held: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    limits: set[asyncio.Timeout] = field(default_factory=set)
    """Of the blocks that generate its samples."""


class Spares:
    """The groups at one worker. Trace, of 4 samples with 1 spare:

    async with race(claim, [0, 1])      2 of 4 are here
    async with race(claim, [2, 3])      all are, so that the worker sees who is first
    finished(claim, 2), 0, 3            the third ends the block in which 1 is generated
    """

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._last_s = 0.0

    @asynccontextmanager
    async def race(self, claim: Claim, indices: Collection[int]) -> AsyncIterator[None]:
        """A block that generates samples of a claim; it ends early, and without an error, when its
        group waits for none of them any more."""
        uid, limit = claim.ticket.prompt.uid, asyncio.timeout(None)
        group = self._groups.setdefault(uid, _Group())
        group.held.update(indices)
        group.finished.difference_update(indices)  # issued again
        try:
            async with limit:
                group.limits.add(limit)
                try:
                    yield
                finally:
                    group.limits.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            if not group.limits and self._groups.get(uid) is group:
                del self._groups[uid]

    def finished(self, claim: Claim, index: int, output: GenerationOutput) -> GenerationOutput:
        """Note a finished sample, and cut the spare ones if it was the last that is needed.

        Returns:
            The output, in a group with spare samples stamped in the order in which this is called:
            by the stamps the learner knows which are spare.
        """
        sizing, uid = claim.ticket.sizing, claim.ticket.prompt.uid
        if not sizing.spares or output.error or output.finish_reason == "abort":
            return output
        self._last_s = max(time.time(), self._last_s + _TICK_S)
        if (group := self._groups.get(uid)) is not None:
            group.finished.add(index)
            needed = sizing.num_samples - sizing.spares
            is_whole = len(group.held) == sizing.num_samples
            if not sizing.spare_weight and is_whole and len(group.finished) >= needed:
                del self._groups[uid]
                for limit in group.limits:
                    limit.reschedule(asyncio.get_running_loop().time())
        return msgspec.structs.replace(output, finished_s=self._last_s)

"""Which part of a mixed stream each uid belongs to, without looking at the uids before it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 100
"""Every so many prompts hold each part in its share; weights are kept to one hundredth."""


class Place(NamedTuple):
    """Where a uid lies."""

    part: int
    number: int
    """How many prompts of the same part came before."""


class Mix:
    """Parts by weight. Trace, of weights 2 and 1 with blocks of 3:

    place(0) -> part 0, number 0    block 0 is [0, 1, 0] in the order of (seed, 0)
    place(1) -> part 1, number 0
    place(2) -> part 0, number 1
    place(3) -> part 0, number 2    block 1, in another order
    """

    def __init__(self, weights: Sequence[float], seed: int, block: int = BLOCK) -> None:
        """Share the places of a block out.

        Args:
            weights: positive, one per part; every part gets one place of a block at least.
            seed: of the order within blocks.
            block: places of a block; no less than there are parts.
        """
        self._seed = seed
        self._counts = _shares(weights, max(block, len(weights)) if len(weights) > 1 else 1)
        self._block: tuple[int, np.ndarray] | None = None

    def place(self, uid: int) -> Place:
        """The part of a uid, and its number within the part."""
        if len(self._counts) == 1:
            return Place(0, uid)
        block, position = divmod(uid, int(self._counts.sum()))
        if self._block is None or self._block[0] != block:
            order = np.repeat(np.arange(len(self._counts)), self._counts)
            self._block = (block, np.random.default_rng([self._seed, block, 2]).permutation(order))
        order = self._block[1]
        part = int(order[position])
        before = int((order[:position] == part).sum())
        return Place(part, block * int(self._counts[part]) + before)


def _shares(weights: Sequence[float], places: int) -> np.ndarray:
    """Places by weight, by largest remainder; one at least for each."""
    wanted = np.asarray(weights, float) / sum(weights) * (places - len(weights))
    counts = np.floor(wanted).astype(int)
    for part in np.argsort(counts - wanted, kind="stable")[: places - len(weights) - counts.sum()]:
        counts[part] += 1
    return counts + 1

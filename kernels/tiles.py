"""Tile sizes of the Triton kernels, as data: by kernel, compute capability and bytes of an input.

Chosen by compiling: for every target the stack is empty and nothing spills, shared memory fits, and
a tile has the rows that wgmma (9.0: 64) and tcgen05 (10.0: 128) need. No GPU has timed them yet.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program works on, and how."""

    tokens: int
    words: int
    """Of the vocabulary."""
    depth: int
    """Of the hidden size, loaded at once."""
    num_warps: int
    num_stages: int
    """Loads in flight."""


TILES: dict[tuple[str, int, int], Tile] = {
    ("forward", 80, 2): Tile(128, 128, 32, 8, 4),
    ("forward", 90, 2): Tile(128, 128, 64, 8, 4),
    ("forward", 100, 2): Tile(128, 64, 64, 8, 4),
    ("gradient", 80, 2): Tile(128, 128, 32, 8, 4),
    ("gradient", 90, 2): Tile(128, 128, 64, 8, 4),
    ("gradient", 100, 2): Tile(128, 128, 64, 8, 4),
    ("forward", 80, 4): Tile(64, 64, 32, 4, 3),
    ("forward", 90, 4): Tile(64, 64, 32, 4, 3),
    ("forward", 100, 4): Tile(128, 64, 32, 8, 3),
    ("gradient", 80, 4): Tile(64, 64, 32, 4, 3),
    ("gradient", 90, 4): Tile(64, 64, 32, 4, 3),
    ("gradient", 100, 4): Tile(128, 64, 32, 8, 3),
}

INTERPRETED = Tile(16, 64, 16, 1, 1)
"""Under the interpreter: small enough that small inputs meet every edge."""

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one program may use (CUDA programming guide, technical specifications)."""


def tile_of(kernel: str, capability: int, element_bytes: int) -> Tile:
    """The tile for a device: that of the newest listed target which is not newer.

    Raises:
        ValueError: the device is older than compute capability 8.0.
    """
    targets = [t for name, t, size in TILES if (name, size) == (kernel, element_bytes)]
    if not (fitting := [target for target in targets if target <= capability]):
        raise ValueError(f"compute capability {capability} is below 80, the oldest supported")
    return TILES[kernel, max(fitting), element_bytes]

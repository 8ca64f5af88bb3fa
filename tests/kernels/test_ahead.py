"""What a GPU would run, compiled for three of them: nothing spills, everything fits.

In a process of its own, because in this one triton is set to interpret.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slipstream.kernels.tiles import SHARED_MEMORY, TILES, tile_of

SCRIPT = Path(__file__).parents[1] / "bench" / "bench_kernels.py"
TOO_LARGE = ["--more", "forward", "100", "128,128,64,8,4"]


@pytest.fixture(scope="module")
def kernels():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry", *TOO_LARGE], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_tile_compiles_without_a_spill_and_within_shared_memory(kernels):
    assert len(kernels) == len(TILES) + 3 + 1
    for kernel in kernels[:-1]:
        assert kernel["stack_bytes"] == kernel["spill_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= SHARED_MEMORY[kernel["capability"]], kernel


def test_matrix_products_use_the_targets_own_instructions(kernels):
    own = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
    for kernel in kernels[:-1]:
        used = {name for name, count in kernel["matmuls"].items() if count}
        want = set() if kernel["kernel"] == "policy_loss" else {own[kernel["capability"]]}
        assert used == want, kernel


def test_a_tile_that_is_too_large_is_seen_to_spill(kernels):
    assert kernels[-1]["stack_bytes"] > 0
    assert kernels[-1]["spill_bytes"] > 0


def test_a_newer_device_takes_the_newest_tile_and_an_older_one_is_refused():
    assert tile_of("forward", 103, 2) == TILES["forward", 100, 2]
    assert tile_of("gradient", 89, 4) == TILES["gradient", 80, 4]
    with pytest.raises(ValueError, match="capability 75 is below 80"):
        tile_of("forward", 75, 2)

"""`slipstream doctor --address ...`: whether a run can start on every node of a Ray cluster.

Each node examines itself as `slipstream doctor` does; versions, clocks and the folder are compared
with this machine's. The code that does so is this machine's, as in a run.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..buffer.errors import SlipstreamError
from .doctor import machine_report
from .ray_child import answer, versions
from .ray_launcher import connect

LOOK_DEADLINE_S = 120.0
"""Importing slipstream on a cold node is slow."""
CLOCK_S = 1.0
"""More than this and times in logs and metrics mislead; nothing else depends on wall clocks."""


class Looked(NamedTuple):
    """What a node says of itself."""

    lines: list[str]
    versions: dict[str, str]
    clock_s: float
    """Its wall clock when it answered."""
    sees: bool
    """Whether the folder is there, too."""


def cluster_report(address: str, folder: Path) -> tuple[bool, list[str]]:
    """Whether all is well, and in lines what was found, node by node.

    Args:
        address: `auto`, or HOST:PORT of the head.
        folder: where runs lie, which all nodes must see.
    Raises:
        ConfigError: there is no such cluster.
    """
    connect(address, folder, with_code=True)
    ok, lines = True, []
    try:
        for node in ray.nodes():
            name = f"{node['NodeManagerHostname']} {node['NodeID'][:8]}"
            fine, told = _ask(node, folder) if node["Alive"] else (False, ["BAD  the node is dead"])
            ok &= fine
            lines += [f"{name}: {line}" for line in told]
    finally:
        ray.shutdown()
    return ok, lines


def _ask(node: dict[str, Any], folder: Path) -> tuple[bool, list[str]]:
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    look = ray.remote(look_here).options(num_cpus=0, scheduling_strategy=here)
    try:
        asked_s = time.time()
        looked = Looked(*answer(look.remote(str(folder)), LOOK_DEADLINE_S))
        return judge(looked, versions(), asked_s, time.time(), folder)
    except SlipstreamError as error:
        return False, [f"BAD  {error}"]


def look_here(folder: str) -> tuple[list[str], dict[str, str], float, bool]:
    """Examine this node; the fields of a `Looked`, as plain values."""
    there = Path(folder)
    _, lines = machine_report(there)
    return lines, versions(), time.time(), there.is_dir()


def judge(
    looked: Looked, ours: dict[str, str], asked_s: float, answered_s: float, folder: Path
) -> tuple[bool, list[str]]:
    """Hold a node against this machine.

    Args:
        looked: what it said.
        ours: versions here.
        asked_s: wall clock here; a right clock there answered after it,
        answered_s: and before this.
        folder: where runs lie.
    """
    found = []
    if other := {k: v for k, v in looked.versions.items() if v != ours[k]}:
        found.append(f"versions differ: it has {other}, here { ({k: ours[k] for k in other}) }")
    off_s = max(asked_s - looked.clock_s, looked.clock_s - answered_s)
    if off_s > CLOCK_S:
        found.append(f"its clock is off by {off_s:.1f} s")
    if not looked.sees:
        found.append(f"it does not see {folder}: runs_dir must be on a file system all nodes share")
    lines = [*looked.lines, *(f"BAD  {line}" for line in found)]
    return not any(line.startswith("BAD") for line in lines), lines

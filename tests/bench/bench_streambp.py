"""Longest trainable sequence under one memory limit: checkpointing, fused loss, StreamBP.

    make bench-streambp

SmolLM2-135M's shape with random weights, float32, one sequence, forward and backward of the
three-policy loss with entropy gradient. Counted are the bytes allocated at once beyond weights and
their gradients, as torch's allocator counts them. The longest sequence lies between
a length that was seen to fit and one, at most a fortieth longer, that was seen not to.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from bench_loss import ENTROPY, largest_sum, seconds, token_loss
from common import emit
from slipstream.kernels import chunked, definition, streambp
from slipstream.kernels.definition import Head
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "max_position_embeddings": 65_536,
}  # fmt: skip
LIMIT_MIB = 512
CHUNK = 256
COLUMNS = {
    "checkpointing + eager loss": (False, definition),
    "checkpointing + fused loss": (False, chunked),
    "StreamBP + fused loss": (True, chunked),
}
TOLERANCE = 1e-5


def build(streamed: bool) -> LlamaForCausalLM:
    """The model, its gradients already there."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    if streamed:
        streambp.enable(model, CHUNK)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def step(model: Any, loss_of: Any, length: int) -> None:
    """Forward and backward of one sequence; gradients add up."""
    g = torch.Generator().manual_seed(length)
    ids = torch.randint(SHAPE["vocab_size"], (1, length), generator=g)
    count = length - 1
    terms = {
        name: torch.full((count,), -11.0) for name in ("proximal", "behaviour", "reference")
    } | {"advantages": torch.randn(count, generator=g), "weights": torch.full((count,), 1 / count)}
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    head = Head(model.lm_head.weight, torch.ones(count))
    loss_of.full(hidden, ids[0, 1:], head, partial(token_loss, terms, ENTROPY)).loss.backward()


def peak_mib(model: Any, loss_of: Any, length: int) -> float:
    """Allocated at once beyond weights and gradients."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(model, loss_of, length)
    return largest_sum(profile) / 2**20


def longest(model: Any, loss_of: Any, limit: float) -> dict[str, Any]:
    """Most tokens seen to fit within the limit, and every measurement.

    Each next length is where the line through the two nearest ones meets the limit, but beyond
    what fits already, and short of what does not.
    """
    points = {length: peak_mib(model, loss_of, length) for length in (128, 256)}
    while True:
        fitting = [length for length, mib in points.items() if mib <= limit]
        low, high = max(fitting), min(points.keys() - fitting, default=None)
        if high is not None and high - low <= max(1, low // 40):
            return {"tokens": low, "MiB by tokens": sorted(points.items())}
        left, right = (low, high) if high else sorted(points)[-2:]
        slope = max(1e-6, points[right] - points[left]) / (right - left)
        guess = left + (limit - points[left]) / slope
        margin = max(1, low // 50)
        most = 2 * low if high is None else max(low + 1, high - margin // 2)
        target = int(min(max(guess + margin / 4, low + margin), most))
        points[target] = peak_mib(model, loss_of, target)


def check_gradients() -> float:
    """Largest relative difference of a parameter's gradient, StreamBP against plain autograd."""
    streamed, plain = build(True), build(False)
    step(streamed, chunked, 700)
    step(plain, chunked, 700)
    worst = 0.0
    for ours, theirs in zip(streamed.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        worst = max(worst, float((ours.grad - theirs.grad).norm() / theirs.grad.norm()))
    if worst > TOLERANCE:
        raise SystemExit(f"gradients differ by {worst}, more than {TOLERANCE}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="do not record")
    parser.add_argument("--limit", type=float, default=LIMIT_MIB, help="MiB")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    worst = check_gradients()
    found, times = {}, {}
    models = {name: build(streamed) for name, (streamed, _) in COLUMNS.items()}
    for name, (_, loss_of) in COLUMNS.items():
        found[name] = longest(models[name], loss_of, options.limit)
    eager, fused, ours = COLUMNS
    for name in [fused, ours] * options.runs:
        run = partial(step, models[name], chunked, found[fused]["tokens"])
        times.setdefault(name, []).append(seconds(run))
    base = {"bench": "streambp", "runs": 1, "spread": found}
    for peer in (eager, fused):
        emit(
            base
            | {
                "case": "streambp", "ours": found[ours]["tokens"], "peer": found[peer]["tokens"],
                "peer_name": peer, "ratio": found[ours]["tokens"] / found[peer]["tokens"],
                "unit": "tokens",
                "notes": f"limit {options.limit:g} MiB beyond weights and gradients; largest "
                f"relative gradient difference {worst:.1e}",
            },
            record=not options.dry,
        )  # fmt: skip
    mine, theirs = (statistics.median(times[name]) for name in (ours, fused))
    emit(
        base
        | {
            "case": "streambp-time", "ours": mine, "peer": theirs, "peer_name": fused,
            "ratio": theirs / mine, "unit": "s", "runs": options.runs, "spread": times,
            "notes": f"{found[fused]['tokens']} tokens, {torch.get_num_threads()} threads",
        },
        record=not options.dry,
    )  # fmt: skip


if __name__ == "__main__":
    main()

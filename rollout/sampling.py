"""The sampling law, and the log-probabilities that go with it.

Law of a token: logits / temperature, then top-k, top-p, min-p; then the inverse of the cumulative
distribution over the kept tokens in token-id order, at one uniform number. The uniform of token i
is a hash of the sample's key and i, so a sample does not depend on the batch it is drawn in.

Shape suffixes: B rows, V vocabulary, K tokens of a row sorted by descending logit.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..buffer.records import SamplingParams
from .config import RatioLaw

_NARROW = 512
"""Truncation first looks at so many top tokens and at all of them only for rows where that is not
enough. Always the same number, so that a row's result depends on that row alone."""

_BLOCK_LOGITS = 1 << 19
"""Rows are drawn in blocks of about so many logits, whose intermediate results stay in the cache
(64 rows of 49,152: 12 ms of processor time instead of 45)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


ACCEPT_STREAM, DRAFT_STREAM = np.uint64(0xACCE97), np.uint64(0xD4AF7)
"""A sample's key, xor one of these: the key of the uniforms that accept its drafts, and of those
that draw them. Independent of the target's own."""


def sample_key(run_seed: int, uid: int, attempt: int, index: int) -> int:
    """64-bit key of one sample's random numbers: a hash of what the sample is, not of when, where
    or beside whom it is drawn."""
    return xxhash.xxh3_64_intdigest(struct.pack("<qqqq", run_seed, uid, attempt, index))


def uniform(key_B: np.ndarray | int, i_B: np.ndarray | int) -> np.ndarray:
    """Uniform number in [0, 1) for token `i_B` of the sample with key `key_B`.

    Args:
        key_B: [B] non-negative integers below 2^64, or one for all.
        i_B: the same, broadcast against `key_B`.
    Returns:
        [B] float64, multiples of 2^-53.
    Source: SplitMix64's output function (Steele, Lea, Flood 2014) at state key + (i + 1) * golden.
    """
    keys_B = np.atleast_1d(np.asarray(key_B, dtype=np.uint64))
    counters_B = np.atleast_1d(np.asarray(i_B, dtype=np.uint64))
    state_B = keys_B + (counters_B + np.uint64(1)) * _GOLDEN
    state_B = (state_B ^ (state_B >> np.uint64(30))) * _MIX_1
    state_B = (state_B ^ (state_B >> np.uint64(27))) * _MIX_2
    state_B = state_B ^ (state_B >> np.uint64(31))
    return (state_B >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLaws:
    """The sampling parameters of a batch, one array per parameter."""

    temperature_B: np.ndarray
    """[B] float64; 0 is greedy."""
    top_k_B: np.ndarray
    """[B] int64; 0 keeps all."""
    top_p_B: np.ndarray
    """[B] float64."""
    min_p_B: np.ndarray
    """[B] float64."""

    def __getitem__(self, rows: np.ndarray | slice) -> "RowLaws":
        """The laws of some rows."""
        return RowLaws(
            temperature_B=self.temperature_B[rows],
            top_k_B=self.top_k_B[rows],
            top_p_B=self.top_p_B[rows],
            min_p_B=self.min_p_B[rows],
        )

    @staticmethod
    def of(laws: Sequence[SamplingParams]) -> "RowLaws":
        """Of samples, one each."""
        return RowLaws(
            temperature_B=np.array([law.temperature for law in laws], dtype=np.float64),
            top_k_B=np.array([law.top_k for law in laws], dtype=np.int64),
            top_p_B=np.array([law.top_p for law in laws], dtype=np.float64),
            min_p_B=np.array([law.min_p for law in laws], dtype=np.float64),
        )

    @property
    def truncates_B(self) -> np.ndarray:
        """[B] bool: whether the law removes tokens (greedy rows have one token anyway)."""
        cuts_B = (self.top_k_B > 0) | (self.top_p_B < 1.0) | (self.min_p_B > 0.0)
        return cuts_B & (self.temperature_B > 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What was drawn for each row."""

    token_ids_B: np.ndarray
    """[B] int64."""
    logprobs_B: np.ndarray
    """[B] float64; NaN for a row whose logits hold NaN or +inf: its token means nothing."""
    removed_mass_B: np.ndarray
    """[B] float64: probability under temperature alone of the tokens that truncation removed."""
    kept_ids: dict[int, np.ndarray]
    """Row -> ascending int32 ids of its kept set, for the rows whose law truncates."""

    def put(self, rows_B: np.ndarray, draws: "Draws") -> None:
        """Take over the draws of some rows."""
        self.token_ids_B[rows_B] = draws.token_ids_B
        self.logprobs_B[rows_B] = draws.logprobs_B
        self.removed_mass_B[rows_B] = draws.removed_mass_B
        self.kept_ids.update({int(rows_B[i]): ids for i, ids in draws.kept_ids.items()})


def sample(
    logits_BV: Tensor, laws: RowLaws, uniforms_B: np.ndarray, ratio_law: RatioLaw = "temperature"
) -> Draws:
    """Draw one token per row and take its log-probability under the ratio law.

    A row's draw depends on that row's logits, law and uniform alone, and never has probability 0.

    Args:
        logits_BV: [B, V] floating point, unscaled.
        laws: of B rows.
        uniforms_B: [B] float64 in [0, 1).
        ratio_law: `temperature`: log-probability over the whole vocabulary, truncated or not;
            `kept_set`: over the kept tokens. Greedy rows: over the vocabulary at temperature 1.
    Raises:
        ValueError: the number of rows differs.
    """
    rows = logits_BV.shape[0]
    if logits_BV.ndim != 2 or uniforms_B.shape != (rows,) or laws.temperature_B.shape != (rows,):
        raise ValueError(
            f"logits {tuple(logits_BV.shape)}, uniforms {uniforms_B.shape} and laws "
            f"{laws.temperature_B.shape} must have one row each per sample"
        )
    return _by_blocks(
        logits_BV, lambda b: _sample_block(logits_BV[b], laws[b], uniforms_B[b], ratio_law)
    )


def _by_blocks(logits_BV: Tensor, draw: Callable[[slice], Draws]) -> Draws:
    """Draw some rows after others: see `_BLOCK_LOGITS`."""
    rows, vocabulary = logits_BV.shape
    at_once = max(1, _BLOCK_LOGITS // vocabulary)
    if rows <= at_once:
        return draw(slice(rows))
    blocks = [slice(i, min(i + at_once, rows)) for i in range(0, rows, at_once)]
    return _merge(rows, [(np.arange(b.start, b.stop), draw(b)) for b in blocks])


def verify(
    logits_BV: Tensor,
    laws: RowLaws,
    uniforms_B: np.ndarray,
    drafts_B: np.ndarray,
    draft_laws_BV: Tensor,
    accept_B: np.ndarray,
    ratio_law: RatioLaw = "temperature",
) -> Draws:
    """As `sample`, given a token drawn from another law: takes it, or one that it stands too rarely
    for, so that what is returned has the target's law.

    Args:
        logits_BV: [B, V] floating point, the target's, unscaled.
        laws: of B rows, the target's.
        uniforms_B: [B] float64 in [0, 1), for the token that replaces a draft.
        drafts_B: [B] int64, tokens drawn from `draft_laws_BV`.
        draft_laws_BV: [B, V] float64, q; each sums to 1.
        accept_B: [B] float64 in [0, 1), independent of the other uniforms and of the draft.
        ratio_law: as in `sample`.
    Source: Leviathan et al. (arXiv:2211.17192), algorithm 1.
    """
    return _by_blocks(
        logits_BV,
        lambda b: _verify_block(
            logits_BV[b], laws[b], uniforms_B[b], drafts_B[b], draft_laws_BV[b], accept_B[b],
            ratio_law,
        ),
    )  # fmt: skip


def _verify_block(
    logits_BV: Tensor,
    laws: RowLaws,
    uniforms_B: np.ndarray,
    drafts_B: np.ndarray,
    draft_laws_BV: Tensor,
    accept_B: np.ndarray,
    ratio_law: RatioLaw,
) -> Draws:
    weights_BV = _weights(logits_BV, laws.temperature_B).double()
    kept_BV = _kept_everywhere(weights_BV, laws)
    total_B1, kept_mass_B1 = weights_BV.sum(-1, True), (weights_BV * kept_BV).sum(-1, True)
    target_BV = weights_BV * kept_BV / kept_mass_B1
    draft_B1 = torch.from_numpy(drafts_B)[:, None]
    bar_B1 = torch.from_numpy(accept_B)[:, None] * draft_laws_BV.gather(-1, draft_B1)
    accepted_B1 = bar_B1 < target_BV.gather(-1, draft_B1)
    rest_BV = (target_BV - draft_laws_BV).clamp(min=0.0)
    token_B1 = torch.where(accepted_B1, draft_B1, _invert(rest_BV.cumsum(-1), uniforms_B))
    cuts_B = laws.truncates_B
    normaliser_B1 = torch.where(
        torch.from_numpy(cuts_B & (ratio_law == "kept_set"))[:, None], kept_mass_B1, total_B1
    )
    removed_B = (1.0 - kept_mass_B1 / total_B1)[:, 0].clamp(min=0.0).numpy()
    return Draws(
        token_ids_B=token_B1[:, 0].numpy(),
        logprobs_B=(weights_BV.gather(-1, token_B1) / normaliser_B1).log()[:, 0].numpy(),
        removed_mass_B=np.where(cuts_B, removed_B, 0.0),
        kept_ids={
            int(row): kept_BV[row].nonzero()[:, 0].numpy().astype(np.int32)
            for row in np.flatnonzero(cuts_B)
        },
    )


def _kept_everywhere(weights_BV: Tensor, laws: RowLaws) -> Tensor:
    """[B, V] bool: which tokens a law may draw. Rows are sorted only where it removes some."""
    kept_BV = torch.ones(weights_BV.shape, dtype=torch.bool)
    cut = np.flatnonzero(laws.truncates_B | (laws.temperature_B == 0.0))
    if len(cut):
        laws, weights_BV = laws[cut], weights_BV[cut]
        top_BV, ids_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
        sorted_BV = _kept(top_BV, weights_BV.sum(-1, True), laws)
        sorted_BV[:, 1:] &= torch.from_numpy(laws.temperature_B > 0.0)[:, None]
        kept_BV[cut] = torch.zeros_like(sorted_BV).scatter_(-1, ids_BV, sorted_BV)
    return kept_BV


def probabilities(logits_BV: Tensor, laws: RowLaws) -> Tensor:
    """[B, V] float64: the law that `sample` draws from."""
    weights_BV = _weights(logits_BV, laws.temperature_B).double()
    weights_BV *= _kept_everywhere(weights_BV, laws)
    return weights_BV / weights_BV.sum(-1, True)


def _sample_block(
    logits_BV: Tensor, laws: RowLaws, uniforms_B: np.ndarray, ratio_law: RatioLaw
) -> Draws:
    weights_BV = _weights(logits_BV, laws.temperature_B)
    truncated_B = laws.truncates_B
    if not truncated_B.any():
        return _draw_whole(weights_BV, laws.temperature_B, uniforms_B)
    cut, whole = np.flatnonzero(truncated_B), np.flatnonzero(~truncated_B)
    draws = _draw_truncated(weights_BV[cut], laws[cut], uniforms_B[cut], ratio_law)
    if not len(whole):
        return draws
    others = _draw_whole(weights_BV[whole], laws.temperature_B[whole], uniforms_B[whole])
    return _merge(len(uniforms_B), [(cut, draws), (whole, others)])


def _weights(logits_BV: Tensor, temperature_B: np.ndarray) -> Tensor:
    """[B, V] probabilities over that of the likeliest token, under temperature alone (greedy rows:
    at temperature 1). In float32 at least."""
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    weights_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    divisor_B = np.where(temperature_B > 0.0, temperature_B, 1.0)
    if (divisor_B != 1.0).any():
        weights_BV.div_(torch.from_numpy(divisor_B).to(weights_BV.dtype)[:, None])
    return weights_BV.exp_()


def _draw_whole(weights_BV: Tensor, temperature_B: np.ndarray, uniforms_B: np.ndarray) -> Draws:
    """Draw from the whole vocabulary; greedy rows take the highest logit."""
    cdf_BV = weights_BV.cumsum(dim=-1, dtype=torch.float64)
    token_B1 = _invert(cdf_BV, uniforms_B)
    greedy_B = temperature_B == 0.0
    if greedy_B.any():
        highest_B1 = weights_BV.argmax(-1, keepdim=True)
        token_B1 = torch.where(torch.from_numpy(greedy_B)[:, None], highest_B1, token_B1)
    logprob_B1 = weights_BV.gather(-1, token_B1).double().log() - cdf_BV[:, -1:].log()
    return Draws(
        token_ids_B=token_B1[:, 0].numpy(),
        logprobs_B=logprob_B1[:, 0].numpy(),
        removed_mass_B=np.zeros(len(uniforms_B)),
        kept_ids={},
    )


def _invert(cdf_BN: Tensor, uniforms_B: np.ndarray) -> Tensor:
    """[B, 1] first position whose cumulative weight exceeds u * total: never one of weight 0.

    u * total can round up to total itself; then the last position that added weight is taken.
    """
    total_B1 = cdf_BN[:, -1:].contiguous()
    target_B1 = torch.from_numpy(uniforms_B)[:, None] * total_B1
    first_B1 = torch.searchsorted(cdf_BN, target_B1, right=True)
    last_B1 = torch.searchsorted(cdf_BN, total_B1)
    return torch.minimum(first_B1, last_B1).clamp_(max=cdf_BN.shape[-1] - 1)


def _draw_truncated(
    weights_BV: Tensor, laws: RowLaws, uniforms_B: np.ndarray, ratio_law: RatioLaw
) -> Draws:
    """Draw under top-k, top-p and min-p: among the top `_NARROW` tokens where they suffice."""
    vocabulary = weights_BV.shape[-1]
    total_B1 = weights_BV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    top_BK, ids_BK = weights_BV.topk(min(_NARROW, vocabulary), dim=-1)
    kept_BK = _kept(top_BK, total_B1, laws)
    ran_out_B = kept_BK[:, -1].numpy() & (laws.top_k_B == 0)
    wide_B = (ran_out_B | (laws.top_k_B > _NARROW)) & (vocabulary > _NARROW)
    if not wide_B.any():
        return _draw_kept(top_BK, ids_BK, kept_BK, total_B1, uniforms_B, ratio_law)
    narrow, wide = np.flatnonzero(~wide_B), np.flatnonzero(wide_B)
    among = (top_BK[narrow], ids_BK[narrow], kept_BK[narrow], total_B1[narrow])
    near = _draw_kept(*among, uniforms_B[narrow], ratio_law)
    top_BV, ids_BV = weights_BV[wide].sort(dim=-1, descending=True, stable=True)
    among = (top_BV, ids_BV, _kept(top_BV, total_B1[wide], laws[wide]), total_B1[wide])
    far = _draw_kept(*among, uniforms_B[wide], ratio_law)
    return _merge(len(uniforms_B), [(narrow, near), (wide, far)])


def _kept(top_BK: Tensor, total_B1: Tensor, laws: RowLaws) -> Tensor:
    """[B, K] bool: which of a row's tokens, by descending weight, the law keeps: a prefix.

    Top-p keeps tokens until their share, renormalised over the top-k ones, reaches p, the token
    that reaches it included; min-p keeps those of at least min_p times the highest.
    """
    top_BK, num_tokens = top_BK.double(), top_BK.shape[-1]
    limited_B1 = torch.from_numpy(laws.top_k_B > 0)[:, None]
    top_k_B1 = torch.from_numpy(np.where(laws.top_k_B > 0, laws.top_k_B, num_tokens))[:, None]
    top_p_B1 = torch.from_numpy(np.where(laws.top_p_B < 1.0, laws.top_p_B, np.inf))[:, None]
    cumulative_BK = top_BK.cumsum(dim=-1)
    of_top_k_B1 = cumulative_BK.gather(-1, top_k_B1.clamp(max=num_tokens) - 1)
    mass_B1 = torch.where(limited_B1, of_top_k_B1, total_B1)
    kept_BK = torch.arange(num_tokens) < top_k_B1
    kept_BK &= (cumulative_BK - top_BK) / mass_B1 < top_p_B1
    kept_BK &= top_BK >= torch.from_numpy(laws.min_p_B)[:, None] * top_BK[:, :1]
    kept_BK[:, 0] = True
    return kept_BK


def _draw_kept(
    top_BK: Tensor,
    ids_BK: Tensor,
    kept_BK: Tensor,
    total_B1: Tensor,
    uniforms_B: np.ndarray,
    ratio_law: RatioLaw,
) -> Draws:
    """Draw from the kept tokens in token-id order."""
    ids_BK, order_BK = ids_BK.sort(dim=-1)
    kept_BK = kept_BK.gather(-1, order_BK)
    weights_BK = top_BK.gather(-1, order_BK).double() * kept_BK
    cdf_BK = weights_BK.cumsum(dim=-1)
    place_B1 = _invert(cdf_BK, uniforms_B)
    kept_mass_B1 = cdf_BK[:, -1:]
    normaliser_B1 = kept_mass_B1 if ratio_law == "kept_set" else total_B1
    logprob_B1 = weights_BK.gather(-1, place_B1).log() - normaliser_B1.log()
    removed_B1 = (1.0 - kept_mass_B1 / total_B1).clamp(min=0.0)
    ids, kept = ids_BK.numpy().astype(np.int32), kept_BK.numpy()
    return Draws(
        token_ids_B=ids_BK.gather(-1, place_B1)[:, 0].numpy(),
        logprobs_B=logprob_B1[:, 0].numpy(),
        removed_mass_B=removed_B1[:, 0].numpy(),
        kept_ids={row: ids[row][kept[row]] for row in range(len(ids))},
    )


def _merge(num_rows: int, parts: Sequence[tuple[np.ndarray, Draws]]) -> Draws:
    """Put the draws of disjoint sets of rows together."""
    merged = Draws(
        token_ids_B=np.zeros(num_rows, dtype=np.int64),
        logprobs_B=np.zeros(num_rows),
        removed_mass_B=np.zeros(num_rows),
        kept_ids={},
    )
    for rows, draws in parts:
        merged.put(rows, draws)
    return merged

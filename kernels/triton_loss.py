"""The loss operations' Triton kernels. Importing this needs triton; `fused.py` launches them.

The logits of a tile live in registers only: `forward` folds them into three running numbers a
token, `gradient` makes them again and stores their gradient for a slice of the vocabulary.

Shape suffixes as in `definition`; S splits of the vocabulary, B block of tokens, W block of words.
"""

import triton
import triton.language as tl

REMOVED = tl.constexpr(-1e30)
MAX_LOG_RATIO = tl.constexpr(10.0)


@triton.jit
def _logits(
    hidden, weight, bias, temperature, rows_B, words_W, num_tokens, num_words, width,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[B, W] float32 logits over temperature; `REMOVED` beyond the vocabulary.

    PRECISION is `tl.dot`'s, of float32 inputs; "interpreted" widens the inputs first, because the
    interpreter would multiply the bits of bfloat16 as integers.
    """
    depth = tl.arange(0, DEPTH)
    row_ok, word_ok = rows_B < num_tokens, words_W < num_words
    hidden_BK = hidden + rows_B[:, None].to(tl.int64) * width + depth[None, :]
    weight_WK = weight + words_W[:, None].to(tl.int64) * width + depth[None, :]
    sums_BW = tl.zeros((rows_B.shape[0], words_W.shape[0]), tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            h_BK = tl.load(hidden_BK + start, mask=row_ok[:, None], other=0.0)
            w_WK = tl.load(weight_WK + start, mask=word_ok[:, None], other=0.0)
        else:
            inside = depth[None, :] < width - start
            h_BK = tl.load(hidden_BK + start, mask=row_ok[:, None] & inside, other=0.0)
            w_WK = tl.load(weight_WK + start, mask=word_ok[:, None] & inside, other=0.0)
        if PRECISION == "interpreted":
            sums_BW = tl.dot(h_BK.to(tl.float32), tl.trans(w_WK.to(tl.float32)), sums_BW)
        else:
            sums_BW = tl.dot(h_BK, tl.trans(w_WK), sums_BW, input_precision=PRECISION)
    if HAS_BIAS:
        sums_BW += tl.load(bias + words_W, mask=word_ok, other=0.0).to(tl.float32)[None, :]
    degrees_B = tl.load(temperature + rows_B, mask=row_ok, other=1.0)
    logits_BW = tl.maximum(sums_BW / degrees_B[:, None], REMOVED)
    return tl.where(word_ok[None, :], logits_BW, REMOVED)


@triton.jit
def forward(
    hidden, weight, bias, temperature, targets, largest, total, moment, chosen,
    num_tokens, num_words, width, words_per_split,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per token and split: m = max z, sum exp(z - m), sum exp(z - m) (z - m), and the target's z.

    Writes [S, T] float32 each; a split that does not hold the target writes 0 for its z.
    """
    rows_B = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    row_ok = rows_B < num_tokens
    target_B = tl.load(targets + rows_B, mask=row_ok, other=-1)
    max_B = tl.full((TOKENS,), REMOVED, tl.float32)
    sum_B = tl.zeros((TOKENS,), tl.float32)
    moment_B = tl.zeros((TOKENS,), tl.float32)
    chosen_B = tl.zeros((TOKENS,), tl.float32)
    end = tl.minimum((split + 1) * words_per_split, num_words)
    for first in range(split * words_per_split, end, WORDS):
        words_W = first + tl.arange(0, WORDS)
        logits_BW = _logits(
            hidden, weight, bias, temperature, rows_B, words_W, num_tokens, end, width,
            HAS_BIAS, EVEN, DEPTH, PRECISION,
        )  # fmt: skip
        is_target = words_W[None, :] == target_B[:, None]
        chosen_B += tl.sum(tl.where(is_target, logits_BW, 0.0), 1)
        new_max_B = tl.maximum(max_B, tl.max(logits_BW, 1))
        step_B = max_B - new_max_B
        shrink_B = tl.exp(step_B)
        below_BW = logits_BW - new_max_B[:, None]
        mass_BW = tl.exp(below_BW)
        moment_B = shrink_B * (moment_B + sum_B * step_B) + tl.sum(mass_BW * below_BW, 1)
        sum_B = shrink_B * sum_B + tl.sum(mass_BW, 1)
        max_B = new_max_B
    out_B = split * num_tokens + rows_B
    tl.store(largest + out_B, max_B, mask=row_ok)
    tl.store(total + out_B, sum_B, mask=row_ok)
    tl.store(moment + out_B, moment_B, mask=row_ok)
    tl.store(chosen + out_B, chosen_B, mask=row_ok)


@triton.jit
def gradient(
    hidden, weight, bias, temperature, targets, log_total, entropy, by_logprob, by_entropy, out,
    num_tokens, num_words, width,
    first_word, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr,
    WORDS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[T, slice] gradient of the logits before temperature, for `num_words` from `first_word` on.

    weight and bias point at the slice's first word.
    """
    rows_B = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    words_W = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    logits_BW = _logits(
        hidden, weight, bias, temperature, rows_B, words_W, num_tokens, num_words, width,
        HAS_BIAS, EVEN, DEPTH, PRECISION,
    )  # fmt: skip
    row_ok = rows_B < num_tokens
    target_B = tl.load(targets + rows_B, mask=row_ok, other=-1) - first_word
    degrees_B = tl.load(temperature + rows_B, mask=row_ok, other=1.0)
    by_logprob_B = tl.load(by_logprob + rows_B, mask=row_ok, other=0.0) / degrees_B
    by_entropy_B = tl.load(by_entropy + rows_B, mask=row_ok, other=0.0) / degrees_B
    entropy_B = tl.load(entropy + rows_B, mask=row_ok, other=0.0)
    logp_BW = logits_BW - tl.load(log_total + rows_B, mask=row_ok, other=0.0)[:, None]
    slope_BW = by_logprob_B[:, None] + by_entropy_B[:, None] * (logp_BW + entropy_B[:, None])
    grad_BW = -tl.exp(logp_BW) * slope_BW
    grad_BW += tl.where(words_W[None, :] == target_B[:, None], by_logprob_B[:, None], 0.0)
    place_BW = out + rows_B[:, None].to(tl.int64) * num_words + words_W[None, :]
    inside = row_ok[:, None] & (words_W < num_words)[None, :]
    tl.store(place_BW, grad_BW.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _clamped(log_ratio):
    return tl.minimum(tl.maximum(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO)


@triton.jit
def policy_loss(
    current, entropy, proximal, behaviour, reference, advantages, weights,
    loss, by_logprob, by_entropy, ratio, correction, kl_behaviour, kl_reference, clipped, limited,
    num_tokens,
    clip_low, clip_high, correction_low, correction_high, kl_coefficient, entropy_coefficient,
    CISPO: tl.constexpr, CORRECTION: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every term of a token's three-policy loss, its slopes and what is reported of it, in one
    pass over [T] tensors."""
    rows_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = rows_B < num_tokens
    current_B = tl.load(current + rows_B, mask=ok, other=0.0)
    proximal_B = tl.load(proximal + rows_B, mask=ok, other=0.0)
    advantage_B = tl.load(advantages + rows_B, mask=ok, other=0.0)
    weight_B = tl.load(weights + rows_B, mask=ok, other=0.0)
    raw_B = current_B - proximal_B
    ratio_B = tl.exp(_clamped(raw_B))
    moves_B = tl.abs(raw_B) <= MAX_LOG_RATIO
    if CISPO:
        slope_B = -tl.minimum(ratio_B, 1 + clip_high) * advantage_B
        surrogate_B = slope_B * current_B
        clipped_B = ratio_B > 1 + clip_high
    else:
        plain_B = ratio_B * advantage_B
        bounded_B = tl.minimum(tl.maximum(ratio_B, 1 - clip_low), 1 + clip_high) * advantage_B
        clipped_B = bounded_B < plain_B
        surrogate_B = -tl.minimum(plain_B, bounded_B)
        slope_B = tl.where(clipped_B | (moves_B == 0), 0.0, -plain_B)
    behaviour_B = tl.load(behaviour + rows_B, mask=ok, other=0.0)
    correction_B = tl.exp(_clamped(proximal_B - behaviour_B))
    limited_B = correction_B > correction_high
    if CORRECTION == "truncate":
        correction_B = tl.minimum(correction_B, correction_high)
    elif CORRECTION == "mask":
        limited_B = limited_B | (correction_B < correction_low)
        correction_B = tl.where(limited_B, 0.0, correction_B)
    else:
        limited_B = limited_B & False
        correction_B = correction_B * 0 + 1
    loss_B = correction_B * surrogate_B
    slope_B = correction_B * slope_B
    if HAS_REFERENCE:
        raw_kl_B = tl.load(reference + rows_B, mask=ok, other=0.0) - current_B
        log_B = _clamped(raw_kl_B)
        kl_B = tl.exp(log_B) - log_B - 1
        tl.store(kl_reference + rows_B, kl_B, mask=ok)
        loss_B += kl_coefficient * kl_B
        inside = tl.abs(raw_kl_B) <= MAX_LOG_RATIO
        slope_B += tl.where(inside, kl_coefficient * (1 - tl.exp(log_B)), 0.0)
    loss_B -= entropy_coefficient * tl.load(entropy + rows_B, mask=ok, other=0.0)
    tl.store(loss + rows_B, loss_B * weight_B, mask=ok)
    tl.store(by_logprob + rows_B, slope_B * weight_B, mask=ok)
    tl.store(by_entropy + rows_B, -entropy_coefficient * weight_B, mask=ok)
    moved_B = _clamped(current_B - behaviour_B)
    tl.store(kl_behaviour + rows_B, tl.exp(moved_B) - 1 - moved_B, mask=ok)
    tl.store(ratio + rows_B, ratio_B, mask=ok)
    tl.store(correction + rows_B, correction_B, mask=ok)
    tl.store(clipped + rows_B, clipped_B, mask=ok)
    tl.store(limited + rows_B, limited_B, mask=ok)

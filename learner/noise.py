"""The gradient noise scale: how many prompts a batch may have before more of them stop helping.

    of half the prompts of an update and of all of them, the squared norm of the mean gradient
    E |G_n|^2 = |G|^2 + tr(Sigma) / n     n prompts, Sigma the covariance of one's gradient

Two sizes give both unknowns without bias; their ratio is the scale. Single steps are noisy (the
signal may even come out negative), so noise and signal are averaged over steps before they are
divided. Batches well below the scale lose little by being larger; well above it they waste samples.

Source: McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

DECAY = 0.95
"""Of noise and signal from step to step: they look back about 20 steps."""


def noise_and_signal(small: float, whole: float, num_small: int, num: int) -> tuple[float, float]:
    """Unbiased estimates of tr(Sigma) and |G|^2.

    Args:
        small: squared norm of the mean gradient of `num_small` of the prompts.
        whole: of all of them.
        num_small: at least 1.
        num: more than `num_small`.
    """
    noise = (small - whole) / (1 / num_small - 1 / num)
    signal = (num * whole - num_small * small) / (num - num_small)
    return noise, signal


def looked_back(sums_2: Tensor, noise: float, signal: float) -> Tensor:
    """[2] float64: the discounted sums of noise and signal, this step's added."""
    return DECAY * sums_2 + torch.tensor([noise, signal], dtype=torch.float64)


def scale(sums_2: Tensor) -> float | None:
    """Prompts; None while noise hides the signal."""
    noise, signal = sums_2.tolist()
    return noise / signal if signal > 0 and noise >= 0 else None


def squared_norm(gradients: Iterable[Tensor | None]) -> float:
    """Of all together, in float32 at least."""
    squares = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).double() ** 2
        for g in gradients
        if g is not None
    ]
    return float(sum(squares))

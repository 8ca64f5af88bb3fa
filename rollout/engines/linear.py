"""Matrix products laid out for a few to a few hundred rows.

Shape suffixes: M rows, E inputs, F outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_PACKED_WEIGHTS = 1 << 16
"""Smaller matrices stay as they are: oneDNN's own overhead is some 15 microseconds a product."""
_PACKED_FOR_ROWS = 32
"""Tells oneDNN for how many rows to block; what it packs serves all numbers of rows."""


class Linear(NamedTuple):
    """y = x @ weight.T + bias, with weights that oneDNN has packed where it can.

    On two AVX2 cores the packed product of all layers of a 135M model took 24, 40, 59 and 102 ms
    for 4, 16, 32 and 64 rows; `functional.linear` took 50, 57, 80 and 124 ms and `x @ weight.T`
    with weights stored [in, out] took 61, 68, 91 and 134 ms.
    """

    weight: Tensor
    """[F, E], or opaque when packed."""
    bias_F: Tensor | None
    packed: bool

    @staticmethod
    def pack(weight_FE: Tensor, bias_F: Tensor | None) -> "Linear":
        """Lay a weight out; the result shares no memory with it."""
        large = weight_FE.numel() >= _PACKED_WEIGHTS
        if large and weight_FE.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            ops = torch.ops.mkldnn
            packed = ops._reorder_linear_weight(weight_FE.contiguous(), _PACKED_FOR_ROWS)
            return Linear(packed, bias_F, True)
        return Linear(weight_FE.clone(), bias_F, False)

    def __call__(self, x_ME: Tensor) -> Tensor:
        """[M, F]."""
        if not self.packed:
            return functional.linear(x_ME, self.weight, self.bias_F)
        return torch.ops.mkldnn._linear_pointwise(x_ME, self.weight, self.bias_F, "none", [], "")

    def silu(self, x_ME: Tensor) -> Tensor:
        """[M, F] silu(y), while y is in the cache."""
        if not self.packed:
            return functional.silu(self(x_ME), inplace=True)
        return torch.ops.mkldnn._linear_pointwise(x_ME, self.weight, self.bias_F, "swish", [], "")

    def times(self, x_ME: Tensor, factor_MF: Tensor) -> Tensor:
        """[M, F] y * factor, likewise."""
        return self._with("mul", x_ME, factor_MF) if self.packed else self(x_ME).mul_(factor_MF)

    def plus(self, x_ME: Tensor, term_MF: Tensor) -> Tensor:
        """[M, F] y + term, likewise."""
        return self._with("add", x_ME, term_MF) if self.packed else self(x_ME).add_(term_MF)

    def _with(self, operation: str, x_ME: Tensor, other_MF: Tensor) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise.binary
        return product(x_ME, other_MF, self.weight, self.bias_F, operation)

"""Low-rank adapters as they are published, and how whoever gets them merges them onto their base.

    model.layers.0.self_attn.q_proj.lora_A.weight    [R, I]
    model.layers.0.self_attn.q_proj.lora_B.weight    [O, R]
    lora.scale                                       [] float64, alpha / R
    lora.base                                        [16] uint8, digest of the base's file

Learner and engines merge by the same function, so a policy that is published as an adapter is the
one that is published whole. Shape suffixes: O outputs, I inputs, R rank.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .models import ModelError

SCALE, BASE = "lora.scale", "lora.base"
_PART = ".lora_"
"""In the names of A and B, behind that of their layer."""


def adapter_tensors(
    layers: Mapping[str, tuple[Tensor, Tensor]], scale: float, base_digest: str
) -> dict[str, Tensor]:
    """The tensors of a published adapter.

    Args:
        layers: name of a linear layer -> its A and B.
        scale: alpha / rank.
        base_digest: hex, of the file that holds the weights it belongs to.
    """
    digest = torch.frombuffer(bytearray.fromhex(base_digest), dtype=torch.uint8)
    # The widest first, so that each tensor of the file is aligned.
    found = {SCALE: torch.tensor(scale, dtype=torch.float64)}
    for name, (a_RI, b_OR) in layers.items():
        found |= {f"{name}.lora_A.weight": a_RI, f"{name}.lora_B.weight": b_OR}
    return found | {BASE: digest}


def base_of(tensors: Mapping[str, Tensor]) -> str:
    """The digest of the base that an adapter belongs to; empty for weights that are whole."""
    return tensors[BASE].numpy().tobytes().hex() if BASE in tensors else ""


def merged(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a policy by their transformers names, one after the other.

    Args:
        tensors: a base's and an adapter's together; weights without an adapter stay as they are.
    Raises:
        ModelError: the adapter does not fit the base.
    """
    layers = {name.partition(_PART)[0] for name in tensors if _PART in name}
    if odd := sorted(layer for layer in layers if f"{layer}.weight" not in tensors):
        raise ModelError(f"an adapter is of layers that the base has not: {odd[:3]}")
    for name, weight in tensors.items():
        if _PART in name or name in (SCALE, BASE):
            continue
        layer = name.removesuffix(".weight")
        if layer in layers and name != layer:
            try:
                a_RI, b_OR = (tensors[f"{layer}{_PART}{part}.weight"] for part in "AB")
                weight = with_adapter(weight, a_RI, b_OR, float(tensors[SCALE]))
            except (KeyError, ValueError) as error:
                raise ModelError(f"the adapter of {layer} does not fit: {error}") from error
        yield name, weight


def with_adapter(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """[O, I] W + scale B A, summed in float32 at least and rounded once, to the dtype of W.

    Raises:
        ValueError: shapes differ.
    """
    if (b_OR.shape[0], a_RI.shape[1], b_OR.shape[1]) != (*weight_OI.shape, a_RI.shape[0]):
        raise ValueError(f"{tuple(b_OR.shape)} x {tuple(a_RI.shape)}, W {tuple(weight_OI.shape)}")
    precise = torch.promote_types(weight_OI.dtype, torch.float32)
    change_OI = (b_OR @ a_RI) * scale
    return (weight_OI.to(precise) + change_OI.to(precise)).to(weight_OI.dtype)

"""Exact backward through a decoder in chunks of the sequence, layer by layer (StreamBP).

Checkpointing keeps the input of every layer and, in backward, computes a whole layer again: all its
activations exist at once for every token. Here a layer is computed again for some tokens at a time:

    keys, values of all tokens                       no graph
    for each chunk:  its queries attend to them, its output meets its share of the gradient;
                     what that gives for keys and values is added up
    for each chunk:  keys and values once more, with graph, meet that sum

so that beyond a layer's input, keys and values only a chunk's activations exist. It is the chain
rule in another order of summation: equal to plain autograd but for rounding.

Source: StreamBP (arXiv:2506.03077), section 3; there the LM head is streamed as well, here the
fused loss does that.

Shape suffixes: B rows, L tokens, C of a chunk, D hidden size, H heads, E head size.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def enable(model: PreTrainedModel, chunk_tokens: int = 512) -> None:
    """Let the model's decoder run, forward and backward, `chunk_tokens` of the sequence at a time.

    Gradients of the layers' parameters go to `.grad` during `backward()` (as with reentrant
    checkpointing): `torch.autograd.grad` does not see them. Activation checkpointing is what this
    replaces; it is switched off.

    Raises:
        ValueError: a model whose layers are not Llama's or Qwen's with full attention, one with
            attention dropout in training mode, one sharded by FSDP2, or a chunk below 1.
    """
    decoder = model.get_decoder()
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens} must be at least 1")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "the model is sharded by FSDP2, which gathers a layer's weights when the layer's own "
            "forward is called; streaming calls its parts, once a chunk. Use activation "
            "checkpointing with FSDP2"
        )
    for layer in getattr(decoder, "layers", [decoder]):
        _check(layer)
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    decoder.forward = partial(_forward, decoder, chunk_tokens)


def _check(layer: nn.Module) -> None:
    if type(layer).__name__ not in LAYERS:
        raise ValueError(f"{type(layer).__name__} cannot be streamed, only {', '.join(LAYERS)}")
    attention: Any = layer.self_attn
    if getattr(attention, "sliding_window", None):
        raise ValueError("layers with sliding-window attention cannot be streamed")
    if layer.training and attention.attention_dropout:
        raise ValueError("attention dropout cannot be streamed: use model.eval()")


class _Places(NamedTuple):
    """Where tokens are and which may see which."""

    cos_BLE: Tensor
    sin_BLE: Tensor
    mask_BHLL: Tensor | None
    """True where a token attends; None: causal."""
    chunk: int

    def chunks(self, length: int) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk, length)) for i in range(0, length, self.chunk))

    def mask(self, rows: slice, device: torch.device) -> Tensor:
        """[..., C, stop]: what the tokens `rows` attend to, nothing behind them included."""
        if self.mask_BHLL is not None:
            return self.mask_BHLL[..., rows, : rows.stop]
        size = (rows.stop - rows.start, rows.stop)
        return torch.ones(size, dtype=torch.bool, device=device).tril(rows.start)


def _forward(
    decoder: Any,
    chunk: int,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **ignored: Any,
) -> BaseModelOutputWithPast:
    """The decoder's forward; there is no cache, and a mask is [B, 1, L, L] bool and causal."""
    hidden_BLD = decoder.embed_tokens(input_ids)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if attention_mask is not None and (
        attention_mask.ndim != 4 or attention_mask.dtype != torch.bool
    ):
        raise ValueError("a streamed decoder takes an attention mask of [B, 1, L, L] bool, or none")
    cos_BLE, sin_BLE = decoder.rotary_emb(hidden_BLD, position_ids=position_ids)
    places = _Places(cos_BLE, sin_BLE, attention_mask, chunk)
    if torch.is_grad_enabled() and not hidden_BLD.requires_grad:
        hidden_BLD.requires_grad_()  # frozen embeddings: the layers still want their turn
    for layer in decoder.layers:
        hidden_BLD = _Layer.apply(hidden_BLD, layer, places)
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden_BLD))


def _heads(attention: Any, name: str, normed_BCD: Tensor) -> Tensor:
    """[B, H, C, E] of the projection `name`, normed per head where the model does that (Qwen3)."""
    projected = getattr(attention, f"{name}_proj")(normed_BCD)
    split = projected.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (split if norm is None else norm(split)).transpose(1, 2)


def _keys_values(
    layer: Any, hidden_BCD: Tensor, rows: slice, places: _Places
) -> tuple[Tensor, Tensor]:
    normed_BCD = layer.input_layernorm(hidden_BCD)
    keys = _heads(layer.self_attn, "k", normed_BCD)
    cos, sin = places.cos_BLE[:, rows], places.sin_BLE[:, rows]
    return apply_rotary_pos_emb(keys, keys, cos, sin)[1], _heads(layer.self_attn, "v", normed_BCD)


def _all_keys_values(layer: Any, hidden_BLD: Tensor, places: _Places) -> tuple[Tensor, Tensor]:
    parts = [
        _keys_values(layer, hidden_BLD[:, rows], rows, places)
        for rows in places.chunks(hidden_BLD.shape[1])
    ]
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)


def _chunk_output(
    layer: Any, hidden_BCD: Tensor, keys: Tensor, values: Tensor, rows: slice, places: _Places
) -> Tensor:
    """[B, C, D] output of the layer for the tokens `rows`, given the keys and values they see."""
    attention = layer.self_attn
    queries = _heads(attention, "q", layer.input_layernorm(hidden_BCD))
    cos, sin = places.cos_BLE[:, rows], places.sin_BLE[:, rows]
    mixed = scaled_dot_product_attention(
        apply_rotary_pos_emb(queries, queries, cos, sin)[0],
        keys,
        values,
        attn_mask=places.mask(rows, hidden_BCD.device),
        scale=attention.scaling,
        enable_gqa=keys.shape[1] != queries.shape[1],
    )
    hidden_BCD = hidden_BCD + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return hidden_BCD + layer.mlp(layer.post_attention_layernorm(hidden_BCD))


class _Layer(torch.autograd.Function):
    """One decoder layer; saves its input."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_BLD: Tensor, layer: nn.Module, places: _Places
    ) -> Tensor:
        ctx.layer, ctx.places = layer, places
        ctx.save_for_backward(hidden_BLD)
        keys, values = _all_keys_values(layer, hidden_BLD, places)
        output_BLD = torch.empty_like(hidden_BLD)
        for rows in places.chunks(hidden_BLD.shape[1]):
            seen = keys[:, :, : rows.stop], values[:, :, : rows.stop]
            output_BLD[:, rows] = _chunk_output(layer, hidden_BLD[:, rows], *seen, rows, places)
        return output_BLD

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (hidden_BLD,) = ctx.saved_tensors
        layer, places = ctx.layer, ctx.places
        keys, values = _all_keys_values(layer, hidden_BLD, places)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        result_BLD = torch.empty_like(grad_BLD)
        for rows in places.chunks(hidden_BLD.shape[1]):
            leaf = hidden_BLD[:, rows].detach().requires_grad_()
            seen_keys = keys[:, :, : rows.stop].detach().requires_grad_()
            seen_values = values[:, :, : rows.stop].detach().requires_grad_()
            with torch.enable_grad():
                output_BCD = _chunk_output(layer, leaf, seen_keys, seen_values, rows, places)
            torch.autograd.backward(output_BCD, grad_BLD[:, rows])
            assert leaf.grad is not None
            assert seen_keys.grad is not None
            assert seen_values.grad is not None
            result_BLD[:, rows] = leaf.grad
            grad_keys[:, :, : rows.stop] += seen_keys.grad
            grad_values[:, :, : rows.stop] += seen_values.grad
        for rows in places.chunks(hidden_BLD.shape[1]):
            leaf = hidden_BLD[:, rows].detach().requires_grad_()
            with torch.enable_grad():
                outputs = _keys_values(layer, leaf, rows, places)
            torch.autograd.backward(outputs, (grad_keys[:, :, rows], grad_values[:, :, rows]))
            assert leaf.grad is not None
            result_BLD[:, rows] += leaf.grad
        return result_BLD, None, None

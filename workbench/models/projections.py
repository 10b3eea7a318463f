"""The projections of an attention module, as matrices: the output's by query head, the keys' and values'.

Axes: Hq query heads, H KV heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.errors import RecipeError

NAMES = ("o_proj", "out_proj", "dense", "c_proj")  # Llama and most others; OPT; GPT-NeoX, Phi; GPT-2
PLAIN = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
)  # a quantized weight is no matrix to multiply with


Linear = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out]: what torch's F.linear takes
FUSED = ("qkv_proj", "Wqkv", "c_attn")  # rows for queries, keys and values in this order: Phi-3; ModernBERT; GPT-2
INTERLEAVED = "query_key_value"  # query, key and value rows head by head: GPT-NeoX


def makes_keys(module: nn.Module) -> bool:
    """Whether this module projects something to keys and values, under a name known here."""
    return any(isinstance(getattr(module, name, None), nn.Module) for name in ("k_proj", *FUSED, INTERLEAVED))


def key_value_weights(attention: nn.Module, heads: int, kv_heads: int, head_dim: int) -> tuple[Linear, Linear] | None:
    """What the module's input is multiplied by for keys and for values: weights [H * D, hidden], views where possible.

    None where that cannot be read. What it gives must still be compared with the model's own keys and values.
    """
    width = kv_heads * head_dim
    if isinstance(getattr(attention, "k_proj", None), nn.Module):
        both = _matrix(attention, "k_proj"), _matrix(attention, "v_proj")
        return (both[0], both[1]) if both[0] is not None and both[1] is not None else None
    for name in FUSED:
        fused = _matrix(attention, name)
        if fused is not None and fused[0].shape[0] == heads * head_dim + 2 * width:
            first = heads * head_dim
            return _rows(fused, slice(first, first + width)), _rows(fused, slice(first + width, None))
    fused = _matrix(attention, INTERLEAVED)
    if fused is not None and fused[0].shape[0] == 3 * width:
        row = torch.arange(3 * width, device=fused[0].device).view(kv_heads, 3, head_dim)
        return _rows(fused, row[:, 1].flatten()), _rows(fused, row[:, 2].flatten())
    return None


def _matrix(attention: nn.Module, name: str) -> Linear | None:
    """A projection's weight [out, in] and bias; None where there is none in full precision."""
    projection = getattr(attention, name, None)
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in PLAIN or weight.is_meta:
        return None
    bias = getattr(projection, "bias", None)
    outputs_first = weight.detach().T if isinstance(projection, Conv1D) else weight.detach()
    return outputs_first, bias.detach() if isinstance(bias, Tensor) else None


def _rows(linear: Linear, rows: slice | Tensor) -> Linear:
    weight, bias = linear
    return weight[rows], None if bias is None else bias[rows]


def output_weight(attention: nn.Module, heads: int) -> Tensor:
    """What each query head's output is multiplied by: [Hq, D, hidden], a view of the module's own weight.

    Raises:
        RecipeError: the module has no output projection of a kind known here.
    """
    for name in NAMES:
        projection = getattr(attention, name, None)
        weight = getattr(projection, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.dtype in PLAIN and not weight.is_meta:
            transposed = not isinstance(projection, Conv1D)  # GPT-2's is inputs by outputs, the others the reverse
            inputs_first = weight.detach().T if transposed else weight.detach()
            if inputs_first.shape[0] % heads == 0:
                return inputs_first.unflatten(0, (heads, -1))
    raise RecipeError(
        f"This method weighs values by the model's output projection, and {type(attention).__name__} has none that can "
        f"be read ({', '.join(NAMES)} in full precision); snapkv, adakv and cake do without."
    )


def key_weight(attention: nn.Module, heads: int, kv_heads: int, dim: int) -> Tensor:
    """The rows of the key projection: [H, D, hidden], a view of the module's own weight where its rows lie together.

    Raises:
        RecipeError: the module has no key projection of a kind known here.
    """
    weights = key_value_weights(attention, heads, kv_heads, dim)
    if weights is not None and weights[0][0].shape[0] == kv_heads * dim:
        return weights[0][0].unflatten(0, (kv_heads, dim))
    raise RecipeError(
        f"This method orders channels by the model's key projection, and {type(attention).__name__} has none that can be "
        "read in full precision; use bfp(sort=False), or kivi."
    )

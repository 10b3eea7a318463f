"""The output and key projections of an attention module, by head. Axes: Hq query heads, H KV heads, D head_dim."""

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
    """The rows of the key projection: [H, D, hidden], a view of the module's own weight.

    Raises:
        RecipeError: the module has no key projection of a kind known here.
    """
    for name in ("k_proj", "qkv_proj", "query_key_value", "c_attn"):  # Llama and most; Phi-3; GPT-NeoX; GPT-2
        projection = getattr(attention, name, None)
        weight = getattr(projection, "weight", None)
        if not (isinstance(weight, Tensor) and weight.ndim == 2 and weight.dtype in PLAIN and not weight.is_meta):
            continue
        rows = weight.detach().T if isinstance(projection, Conv1D) else weight.detach()  # outputs by inputs
        rows = rows.unflatten(0, (-1, dim))
        if name == "k_proj" and len(rows) == kv_heads:
            return rows
        if name == "query_key_value" and len(rows) == 3 * heads:  # a head's query, key and value side by side
            return rows.unflatten(0, (heads, 3))[:, 1]
        if name in ("qkv_proj", "c_attn") and len(rows) == heads + 2 * kv_heads:  # all queries, all keys, all values
            return rows[heads : heads + kv_heads]
    raise RecipeError(
        f"This method orders channels by the model's key projection, and {type(attention).__name__} has none that can be "
        "read in full precision; use bfp(sort=False), or kivi."
    )

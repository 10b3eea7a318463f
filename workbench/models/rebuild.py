"""Keys and values as a model makes them of a layer's input: its projections, key norm and RoPE, read from the model.

Axes: B batch, n tokens, d hidden_size, H KV heads, D head_dim, r = min(d, H * D) latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import ModelError, RecipeError
from workbench.models.projections import Linear, key_value_weights, makes_keys
from workbench.models.rope import DISTANCE, TOLERANCE, Rope, Ropes

KEY_NORMS = ("k_norm", "k_layernorm")  # Qwen3, Gemma 3, OLMo 2, Cohere; Phi, Persimmon


@dataclass(frozen=True)
class Latents:
    """Matrices, in the layout of torch's linear layers, that take an input to its latents and these to K or V.

    ``down`` [r, d] holds left singular vectors of a projection's [d, H * D] weight, ``up`` [H * D, r] the rest of it.
    """

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Latents:
        """The thin SVD of a linear layer's weight [H * D, d], in float64; kept in the weight's dtype."""
        u, sizes, rest = torch.linalg.svd(weight.double().T, full_matrices=False)
        return cls(u.T.to(weight.dtype).contiguous(), (sizes[:, None] * rest).T.to(weight.dtype).contiguous())


class Rebuild:
    """How one layer makes keys and values of its input.

    Args:
        key, value: the projections.
        norm: of the keys, before RoPE, or None; ``flat``: it runs over all heads together (OLMo 2).
        rope: how the layer turns its keys, or None.
        heads: KV heads.
        copies: which of the weights had to be copied from the model's.
    """

    def __init__(
        self,
        key: Linear,
        value: Linear,
        norm: nn.Module | None,
        flat: bool,
        rope: Rope | None,
        heads: int,
        copies: list[Tensor],
    ) -> None:
        self.key, self.value, self.heads, self.copies = key, value, heads, copies
        self.norm, self.flat = norm, flat
        self.rope = rope if rope is not None and len(rope.frequencies) else None

    def of_input(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, n, D] of inputs x [B, n, d] at ``positions`` [n] or [B, 1, n]."""
        return self._finished(F.linear(x, *self.key), F.linear(x, *self.value), positions)

    def of_latents(self, z: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same from latents [B, n, 2r]: those of the keys, then those of the values."""
        for_keys, for_values = z.chunk(2, -1)
        k = F.linear(for_keys, self.key_latents.up, self.key[1])
        return self._finished(k, F.linear(for_values, self.value_latents.up, self.value[1]), positions)

    def to_latents(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 2r]: the input along the left singular vectors of both projections."""
        return torch.cat([F.linear(x, self.key_latents.down), F.linear(x, self.value_latents.down)], -1)

    def _finished(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Projected k, v [B, n, H * D] as heads, the keys with norm and RoPE."""
        k = self.norm(k) if self.norm is not None and self.flat else k
        k, v = k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))
        k = self.norm(k) if self.norm is not None and not self.flat else k
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return k if self.rope is None else self.rope.rotate(k, positions).to(k.dtype), v

    @cached_property
    def key_latents(self) -> Latents:
        return Latents.of(self.key[0])

    @cached_property
    def value_latents(self) -> Latents:
        return Latents.of(self.value[0])

    @cached_property
    def joint(self) -> Tensor:
        """[min(d, 2HD), d]: left singular vectors of keys' and values' weights together, as rows."""
        return Latents.of(torch.cat([self.key[0], self.value[0]])).down


class Rebuilds:
    """How every layer of a model makes keys and values of its input, read from the model at the first use.

    The model shows whether it was read rightly: one token is fed at two positions, and what is rebuilt of the layers'
    inputs must be the keys and values that the model made.

    Args:
        network: a transformers model; without one there is nothing to read.
    """

    def __init__(
        self,
        network: Any = None,
        ropes: Ropes | None = None,
        layers: int = 0,
        heads: int = 0,
        kv_heads: int = 0,
        head_dim: int = 0,
    ) -> None:
        self._network, self._ropes, self._layers = network, ropes, layers
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim

    def __getitem__(self, layer: int) -> Rebuild:
        layers, trouble = self._found
        if trouble:
            raise ModelError(f"Keys and values cannot be rebuilt from the layers' inputs, since {trouble}.")
        return layers[layer]

    def require(self, key: str) -> None:
        """RecipeError, in one sentence, where the strategy ``key`` cannot rebuild this model's keys and values."""
        _, trouble = self._found
        if trouble:
            raise RecipeError(
                f"{key} rebuilds keys and values from the layers' inputs, but {trouble}; use another method, for example "
                "kivi."
            )

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The attention modules, by layer; empty where they cannot be told apart."""
        found: dict[int, list[nn.Module]] = {}
        for module in self._network.modules() if self._network is not None else ():
            index = getattr(module, "layer_idx", None)
            if isinstance(index, int) and makes_keys(module):
                found.setdefault(index, []).append(module)
        alone = [found[index][0] for index in range(self._layers) if len(found.get(index, ())) == 1]
        return alone if len(alone) == self._layers else []

    @cached_property
    def _found(self) -> tuple[list[Rebuild], str]:
        """The layers' ways, and what is in the way of having them."""
        with torch.no_grad():
            return self._looked_for()

    def _looked_for(self) -> tuple[list[Rebuild], str]:
        if self._network is None:
            return [], "only the config of this model is known, not the model itself"
        shown = self._shown() if self.modules else []
        if len(shown) != self._layers:
            return [], "not every layer of this model projects keys and values in a way known here"
        layers = []
        for number, (module, (x, k, v)) in enumerate(zip(self.modules, shown, strict=True)):
            rebuild = self._read(number, module)
            if rebuild is None:
                return [], f"the projections of layer {number} of this model cannot be read in full precision"
            at = torch.tensor([[[0]], [[DISTANCE]]], device=x.device)  # [B, 1, n]
            if not all(near(made, own) for made, own in zip(rebuild.of_input(x, at), (k, v), strict=True)):
                return [], f"layer {number} of this model makes them in a way that is not known here"
            layers.append(rebuild)
        return layers, ""

    def _read(self, layer: int, module: nn.Module) -> Rebuild | None:
        weights = key_value_weights(module, self._heads, self._kv_heads, self._head_dim)
        if weights is None:
            return None
        norm = next((n for name in KEY_NORMS if isinstance(n := getattr(module, name, None), nn.Module)), None)
        shapes = [tuple(p.shape) for p in norm.parameters()] if norm is not None else []
        flat = self._kv_heads > 1 and shapes[:1] == [(self._kv_heads * self._head_dim,)]
        rope = None if self._ropes is None else self._ropes.known(layer)
        own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        copies = [w for w, _ in weights if w.untyped_storage().data_ptr() not in own]
        return Rebuild(*weights, norm, flat, rope, self._kv_heads, copies)

    def _shown(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per layer the input [2, 1, d], keys and values [2, H, 1, D] of one token at position 0 and at DISTANCE.

        Fewer where not every layer has a module known here, or a cache of its own.
        """
        from transformers.cache_utils import DynamicCache

        inputs: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[module] = input_of(args, kwargs)

        network = self._network
        device = next(network.parameters()).device
        token = torch.full((2, 1), network.config.get_text_config().vocab_size // 2, device=device)
        cache = DynamicCache()
        handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self.modules]
        try:
            network(
                input_ids=token,
                position_ids=torch.tensor([[0], [DISTANCE]], device=device),
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        return [(inputs[m], layer.keys, layer.values) for m, layer in zip(self.modules, cache.layers, strict=False)]


def near(made: Tensor, own: Tensor) -> bool:
    """Whether keys or values that were rebuilt are the model's own, but for rounding; NaN is not."""
    if made.shape != own.shape:
        return False
    return float((made.float() - own.float()).norm() / own.float().norm().clamp_min(1e-20)) <= TOLERANCE


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [B, n, d] that an attention module was called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

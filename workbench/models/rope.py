"""Rotary position embeddings (RoPE): keys and queries as they were before it, and as they would be at other positions.

Axes: n entries, D head_dim, F frequencies: 2F <= D dims turn in pairs, the others pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.errors import ModelError, RecipeError

DISTANCE = 64  # tokens between the two positions at which a model shows how it turns a key
TOLERANCE = 0.05  # relative error of a turned key: bfloat16 stays an order of magnitude below, a wrong pairing above


class Rope:
    """How one layer turns its queries and keys by their positions.

    Everything is float32 and starts from the origin: angles are position times frequency as the model computes them,
    so that turning back undoes what the model did up to its own rounding, however far the position.

    Args:
        frequencies: [F] radians per token, none in a layer without RoPE; the model's own tensor, since LongRoPE
            changes it in place when a text grows long.
        scaling: factor on the dims that turn (YaRN's and LongRoPE's attention factor).
        interleaved: dims (0, 1), (2, 3), … are pairs; otherwise (0, F), (1, F + 1), …
    """

    def __init__(self, frequencies: Tensor, scaling: float = 1.0, interleaved: bool = False) -> None:
        self.frequencies, self.scaling, self.interleaved = frequencies, scaling, interleaved

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., n, D] from before RoPE, turned to ``positions`` [..., n] or [n]: float32."""
        angles = self._angles(positions, x)
        return self._turn(x, angles.cos() * self.scaling, angles.sin() * self.scaling)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., n, D] that the model turned to ``positions`` [..., n] or [n], as before RoPE: float32."""
        angles = self._angles(positions, x)
        return self._turn(x, angles.cos() / self.scaling, -angles.sin() / self.scaling)

    def move(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """x [..., n, D] turned to positions ``old``, as it would be at ``new``: float32, one rotation."""
        angles = self._angles(new, x) - self._angles(old, x)
        return self._turn(x, angles.cos(), angles.sin())

    def mean_rotation(self, positions: Tensor, dim: int) -> Tensor:
        """The mean over ``positions`` [n] of the matrices [D, D] that turn a column vector to them: float32."""
        identity = torch.eye(dim, device=positions.device)
        angles = self._angles(positions, identity)
        cos, sin = angles.cos().mean(0) * self.scaling, angles.sin().mean(0) * self.scaling
        return self._turn(identity, cos, sin).mT  # the rows of the identity become the columns of the matrix

    def _angles(self, positions: Tensor, like: Tensor) -> Tensor:
        return positions.to(like.device)[..., None].float() * self.frequencies.to(like.device).float()  # [..., n, F]

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        turning, passing = x.float().tensor_split([2 * half], -1)
        if self.interleaved:
            a, b = turning[..., 0::2], turning[..., 1::2]
        else:
            a, b = turning[..., :half], turning[..., half:]
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned, passing], -1)


class Ropes:
    """The RoPE of every layer of a model, read from the model at the first use.

    Frequencies are the model's own buffers, whatever scaling made them. Which dims are pairs, whether a layer has RoPE
    at all, and which frequencies it takes where there are several, the model shows: one token alone is fed at two
    positions, where nothing but RoPE can tell its keys apart.

    Args:
        network: a transformers model; without one there is nothing to read.
    """

    def __init__(self, network: Any = None) -> None:
        self.network = network

    def __getitem__(self, layer: int) -> Rope:
        layers, trouble = self._found
        if trouble:
            raise ModelError(f"Keys cannot be turned by their positions, since {trouble}.")
        return layers[layer]

    def known(self, layer: int) -> Rope | None:
        """The layer's RoPE; None in a model that is not known to have any."""
        layers, trouble = self._found
        return None if trouble else layers[layer]

    def require(self, key: str) -> None:
        """RecipeError, in one sentence, where the strategy ``key`` cannot work for want of RoPE."""
        _, trouble = self._found
        if trouble:
            raise RecipeError(
                f"{key} needs rotary position embeddings, but {trouble}; use another method, for example snapkv."
            )

    @cached_property
    def _found(self) -> tuple[list[Rope], str]:
        """The layers' RoPE, and what is in the way of having it."""
        if self.network is None:
            return [], "only the config of this model is known, not the model itself"
        known = [Rope(f, scaling, pairs) for f, scaling in frequencies(self.network) for pairs in (False, True)]
        if not known:
            return [], "this model holds no frequencies of such"
        none = Rope(torch.empty(0))
        layers = []
        for number, (first, later) in enumerate(keys_of_a_token(self.network)):
            fitting = [rope for rope in known if 2 * len(rope.frequencies) <= first.shape[-1]]
            rope, error = closest([none, *fitting], first, later)
            if not error <= TOLERANCE:  # NaN too
                return [], f"how layer {number} of this model turns its keys is not known here"
            layers.append(rope)
        return (layers, "") if any(rope is not none for rope in layers) else ([], "no layer of this model has any")


def frequencies(network: Any) -> Iterator[tuple[Tensor, float]]:
    """Every set of RoPE frequencies [F] that a model holds, with its scaling; Gemma 3 has one per kind of layer."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            kind = name.removesuffix("inv_freq")
            if kind != name and not kind.endswith("original_") and buffer.ndim == 1:
                yield buffer, float(getattr(module, f"{kind}attention_scaling", 1.0))


def keys_of_a_token(network: Any) -> list[tuple[Tensor, Tensor]]:
    """Per layer, the keys [H, D] of one token alone at position 0 and at :data:`DISTANCE`.

    A token that sees only itself gives the same hidden states at every position; so do its keys, but for RoPE.
    """
    from transformers.cache_utils import DynamicCache

    device = next(network.parameters()).device
    token = torch.full((2, 1), network.config.get_text_config().vocab_size // 2, device=device)
    cache = DynamicCache()
    with torch.inference_mode():
        network(
            input_ids=token,
            position_ids=torch.tensor([[0], [DISTANCE]], device=device),
            past_key_values=cache,
            use_cache=True,
        )
    return [(layer.keys[0, :, 0], layer.keys[1, :, 0]) for layer in cache.layers]


def closest(ropes: list[Rope], first: Tensor, later: Tensor) -> tuple[Rope, float]:
    """The RoPE that best turns the keys ``first`` [H, D] at position 0 into ``later``, and its relative error."""
    origin, away = torch.zeros(1), torch.full((1,), DISTANCE)
    size = float(later.float().norm().clamp_min(1e-20))
    errors = [float((rope.move(first, origin, away) - later.float()).norm()) / size for rope in ropes]
    best = min(range(len(ropes)), key=errors.__getitem__)
    return ropes[best], errors[best]

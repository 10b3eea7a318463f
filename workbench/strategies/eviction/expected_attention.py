"""Expected Attention (arXiv 2510.00636): the attention that queries still to come will pay, if they are like the prompt's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import param
import torch
from torch import Tensor

from workbench.strategies.eviction.base import PROTECTED, Eviction

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class ExpectedAttention(Eviction):
    """Score = expected softmax weight under normally distributed future queries, mean over the group, times the norm of
    the value; the first `sinks` tokens always stay.

    Mean and covariance are those of the prompt's own queries before RoPE, without the sinks', turned by the mean rotation
    of the next `n_future` positions. They are merged chunk by chunk (Chan et al. 1979), so nothing as long as the prompt is
    held. A soft-capping of the logits (Gemma 2) is left out of the expectation.

    Axes: B batch, Hq query heads, H KV heads, G group, n entries, D head_dim.
    """

    key = "expected_attention"
    title = "Expected Attention"
    paper = "arXiv 2510.00636"
    summary = "Keeps what the queries to come are expected to attend to, judging by those of the prompt."

    n_future = param.Integer(
        512, bounds=(1, 65536), doc="positions after the prompt over which the rotation is averaged"
    )
    sinks = param.Integer(4, bounds=(0, 256), doc="first tokens that always stay, and whose queries do not count")
    use_covariance = param.Boolean(True, doc="whether the spread of the queries counts, or only their mean")
    use_vnorm = param.Boolean(True, doc="whether the expected weight is multiplied by the norm of the value")
    epsilon = param.Number(0.0, bounds=(0.0, 10.0), doc="added to the expected weight before the norm of the value")

    @property
    def needs_prompt(self) -> bool:
        return True

    def check(self, geometry: Geometry) -> None:
        geometry.ropes.require(self.key)

    def on_chunk(self, view: LayerView) -> None:
        at = view.asked()
        sinks = int((at < self.sinks).sum())
        q = view.rope.unrotate(view.chunk, at)[:, :, sinks:]  # [B, Hq, t, D]
        count, before = q.shape[2], int(view.state.get("queries", 0))
        if count == 0:
            return
        view.state["queries"] = torch.tensor(before + count)
        mean, share = q.mean(2), count / (before + count)
        known = view.state.get("mean", torch.zeros_like(mean))
        shift = mean - known
        view.state["mean"] = known + share * shift  # [B, Hq, D]
        if self.use_covariance:
            centred = q - mean[:, :, None]
            spread = centred.mT @ centred + before * share * shift[..., :, None] * shift[..., None, :]
            view.state["spread"] = view.state.get("spread", 0.0) + spread  # [B, Hq, D, D], a sum over the queries

    def score(self, view: LayerView) -> Tensor:
        sinks = view.positions() < self.sinks  # [B, H, n]
        if "mean" not in view.state:  # the prompt is all sinks
            return sinks.float()
        keys, dim = view.keys().float(), view.chunk.shape[-1]
        future = torch.arange(view.seen, view.seen + self.n_future, device=keys.device)
        turn = view.rope.mean_rotation(future, dim)
        mean = (view.state["mean"] @ turn.mT).unflatten(1, (view.kv_heads, -1))  # [B, H, G, D]
        logits = torch.einsum("bhgd,bhnd->bhgn", mean, keys) * view.scale
        if self.use_covariance:
            covariance = turn @ (view.state["spread"] / int(view.state["queries"])) @ turn.mT
            for g, of_head in enumerate(covariance.unflatten(1, (view.kv_heads, -1)).unbind(2)):  # [B, H, D, D]
                logits[:, :, g] += ((keys @ of_head) * keys).sum(-1) * (view.scale**2 / 2)
        weights = logits.masked_fill(sinks[:, :, None], -torch.inf).softmax(-1).mean(2)  # [B, H, n]
        if self.use_vnorm:
            weights = (weights + self.epsilon) * view.values().float().norm(dim=-1)
        return weights.masked_fill(sinks, PROTECTED)

    def forget(self, view: LayerView) -> None:
        for name in ("queries", "mean", "spread"):
            view.state.pop(name, None)

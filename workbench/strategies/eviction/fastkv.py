"""FastKV (arXiv 2502.01068): token-selective propagation (TSP), and apart from it what each layer keeps.

After a middle layer t the set of tokens that matter hardly changes any more. Layers 0 … t read all T tokens of the
prompt; after layer t only the most important ones go on, in their order and with their original positions. So L layers
do ((t + 1) + (L - t - 1) * tsp_rate) / L of the work that is linear in the prompt, and the entries that later layers
never had cannot be recalled. Every layer, early or late, then keeps ``budget`` of the prompt's tokens.

Axes: B batch, H KV heads, G group, W window, n entries, T tokens of the prompt.
"""

from __future__ import annotations

from typing import Any

import param
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.errors import RecipeError
from workbench.models.geometry import Geometry
from workbench.strategies.base import Budget, tokens_kept
from workbench.strategies.eviction.base import PROTECTED, Eviction, select_top


class FastKV(Eviction):
    """Score = attention of the last `window` queries, summed over them, pooled over neighbours per query head, then
    summed over the group. A token's importance at layer t is the sum of its scores over the KV heads.

    ``budget`` is the paper's retain rate. Later layers cannot keep more than they are given: a budget above `tsp_rate`
    keeps everything there. A budget given as a number that the prompt does not reach leaves the prompt alone.
    """

    key = "fastkv"
    title = "FastKV"
    paper = "arXiv 2502.01068"
    summary = (
        "Lets only the tokens that matter go on beyond the middle layers, which shortens the reading of the prompt."
    )
    scores_alone = False

    budget = Budget(0.2, doc="share of the prompt's tokens kept per KV head (0.2), or their number (64)", precedence=-1)
    tsp_rate = param.Number(
        0.2, bounds=(0.0, 1.0), doc="share of the prompt's tokens given to the layers after the TSP layer; 1.0 is all"
    )
    tsp_layer = param.Integer(
        None,
        bounds=(0, 1023),
        doc="the last layer that is given all tokens, from 0; left out, (layers - 1) // 2 or the nearest full-attention one",
    )
    window = param.Integer(8, bounds=(1, 512), doc="queries at the end of the prompt that vote, and stay")
    kernel = param.Integer(7, bounds=(1, 63), doc="width of the pooling over neighbouring tokens (odd)")
    pooling: Any = param.Selector(default="max", objects=["max", "avg"], doc="how neighbouring tokens are pooled")

    @property
    def score_window(self) -> int:
        return self.window

    @property
    def needs_token_set(self) -> bool:
        return self.tsp_rate < 1.0

    def check(self, geometry: Geometry) -> None:
        if self.tsp_layer is not None and self.tsp_layer >= geometry.num_layers:
            raise RecipeError(
                f"fastkv: tsp_layer={self.tsp_layer} is no layer of this model, which has layers 0 to "
                f"{geometry.num_layers - 1}; choose one of them, or leave it out."
            )

    def tsp_layer_of(self, geometry: Geometry) -> int:
        """Layer t of a model. A sliding layer's last queries see the newest tokens only, so by default it is none."""
        if self.tsp_layer is not None:
            return self.tsp_layer
        half, windows = (geometry.num_layers - 1) // 2, geometry.sliding_windows
        full = [layer for layer, window in enumerate(windows) if window is None]
        return min(full, key=lambda layer: (abs(layer - half), -layer), default=half)

    def tokens_going_on(self, tokens: int) -> int:
        """How many of a prompt's ``tokens`` go on after layer t, the window among them."""
        if isinstance(self.budget, int) and self.budget > tokens:
            return tokens
        return min(tokens, max(self.window, tokens_kept(self.tsp_rate, tokens)))

    def after_prefill(self, view: LayerView) -> None:
        if self.needs_token_set and view.layer == self.tsp_layer_of(view.geometry):
            view.pass_on(self.going_on(view))
        super().after_prefill(view)

    def going_on(self, view: LayerView) -> Tensor:
        """Positions of the tokens that go on after layer t: int64 [tokens_going_on], ascending."""
        scores, at = self.score(view)[0], view.positions()[0].long()  # [H, n]; one prompt at a time
        importance = torch.zeros(view.prompt_length, device=scores.device)  # 0 where no head holds the token
        for row, positions in zip(scores, at, strict=True):
            importance[positions] += row
        importance[-self.window :] = PROTECTED
        return select_top(importance, self.tokens_going_on(view.prompt_length))

    def score(self, view: LayerView) -> Tensor:
        votes = view.window_attention(self.window).sum(3)  # [B, H, G, n]
        window = min(self.window, view.length)
        older = votes[..., : view.length - window]
        scores = self.pooled(older.flatten(1, 2)).unflatten(1, older.shape[1:3]).sum(2)  # [B, H, n - W]
        return F.pad(scores, (0, window), value=PROTECTED)

    def pooled(self, votes: Tensor) -> Tensor:
        """[B, H * G, m] pooled along m: the average counts what lies beyond the edges as 0, the maximum leaves it out."""
        if votes.shape[-1] == 0:
            return votes
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(votes, self.kernel, stride=1, padding=self.kernel // 2)[..., : votes.shape[-1]]

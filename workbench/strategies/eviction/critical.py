"""CriticalKV (arXiv 2502.03805): an entry adds its attention times the size of its projected value to the output."""

from __future__ import annotations

import param
import torch
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.strategies.eviction.base import PROTECTED, Wrapper, select_top

BLOCK = 2048  # values projected at a time: 32 MiB in float32 where hidden is 4096


class CriticalKV(Wrapper):
    """Any scorer of attention; the first stage goes by its score, the rest by (score + epsilon) * ‖v W_O‖₁.

    Heads that share a budget are compared by the scorer's score and choose in two stages within what they get:
    ``adakv(scorer="critical", window=16)`` is Ada-CriticalKV.
    """

    key = "critical"
    title = "CriticalKV"
    paper = "arXiv 2502.03805"
    summary = "Weighs another method's scores by what each value adds to the layer's output."

    first_stage = param.Number(0.5, bounds=(0.0, 1.0), doc="share of the budget that goes by the scorer's scores alone")
    epsilon = param.Number(1e-4, bounds=(0.0, 1.0), doc="added to the scores, so that a value counts without attention")

    def score(self, view: LayerView) -> Tensor:
        count = self.allocator_part.count(self, view)
        norms = value_norms(view.values(), view.output_weight())
        return self.weighed(self.inner.score(view), norms, int(count * self.first_stage))

    def need(self, view: LayerView) -> Tensor:
        return self.inner.need(view)

    def choose(self, view: LayerView, rows: list[Tensor], safe: int) -> list[Tensor]:
        plain = self.need(view).flatten(0, 1)  # [B * H, n]
        norms = value_norms(view.values(), view.output_weight()).flatten(0, 1)
        firsts = [max(safe, int(len(best) * self.first_stage)) for best in rows]
        weighed = [self.weighed(*row) for row in zip(plain, norms, firsts, strict=True)]
        view.note_scores(torch.stack(weighed).unflatten(0, (view.batch, view.kv_heads)))
        return [select_top(scores, len(best)) for scores, best in zip(weighed, rows, strict=True)]

    def weighed(self, plain: Tensor, norms: Tensor, first: int) -> Tensor:
        """Scores [..., n] times the values' norms; the ``first`` best as they were stay."""
        scores = torch.where(plain == PROTECTED, plain, (plain + self.epsilon) * norms)
        return scores.scatter(-1, select_top(plain, first), PROTECTED)


def value_norms(values: Tensor, weight: Tensor) -> Tensor:
    """‖v W_O‖₁ of every entry, mean over the query heads of its group: float32 [B, H, n].

    Args:
        values: [B, H, n, D].
        weight: [Hq, D, hidden], the output projection by query head.
    """
    group = weight.shape[0] // values.shape[1]
    norms = []
    for head, projection in enumerate(weight):
        blocks = values[:, head // group].split(BLOCK, 1)  # [B, BLOCK, D] each
        norms.append(torch.cat([(block.float() @ projection.float()).abs().sum(-1) for block in blocks], 1))
    return torch.stack(norms, 1).unflatten(1, (-1, group)).mean(2)

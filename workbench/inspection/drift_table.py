"""Everything measured of a lane's drift, by place, step and token, and its summaries.

Axes: L layers, H KV heads, Hq query heads, T tokens of the prompt, S steps (0 leads to the first generated token).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.inspection.storage import HeadDrift, Status, VectorDrift

SINKS = 4  # first tokens that summaries leave out once: their keys are long and their values short


@dataclass
class Reads:
    """Read drift of one mode: ``values`` by name float32 [S, L, Hq]; ``layer_error`` [S, L], NaN where the model's output
    projection cannot be read."""

    values: dict[str, Tensor]
    layer_error: Tensor


@dataclass
class Drift:
    """Drift of a lane against the reference; made by :func:`workbench.drift`.

    Attributes:
        recipe, reference: what was compared.
        status: uint8 [L, H, T], a :class:`~workbench.inspection.storage.Status` per token: eviction is one, and no distance.
        stored: ``key_…``, ``centred_key_…`` and ``value_…`` with ``cosine``, ``relative`` and ``norm_ratio``: float32
            [L, H, T], NaN where the lane does not hold the token.
        frobenius: ``keys``, ``centred``, ``values``: float32 [L, H], over the tokens both hold together.
        local: every layer asked the reference's own query: what this layer does wrong by itself.
        propagated: the lane's own activations, the reference's tokens: what has added up until here.
        decoded_keys, decoded_values: relative error of what the lane holds for the tokens fed after the prompt,
            propagated: float32 [L, H, tokens fed].
        floor: the same of the reference read once more in other chunks, which differs by rounding alone: nothing below it
            means anything. None if it was not asked for.
        turned_keys: the recipe turns keys to other positions, so key drift includes the turn.
    """

    recipe: str
    reference: str
    status: Tensor
    stored: dict[str, Tensor]
    frobenius: dict[str, Tensor]
    local: Reads
    propagated: Reads
    decoded_keys: Tensor
    decoded_values: Tensor
    turned_keys: bool = False
    floor: Drift | None = field(default=None, repr=False)

    @property
    def coverage(self) -> Tensor:
        """The share of tokens the lane represents, of those the reference holds: float32 [L, H]."""
        held = ((self.status == Status.KEPT) | (self.status == Status.QUANTIZED)).sum(-1)
        return held / (self.status != Status.OUT).sum(-1)

    def by_kv_head(self, name: str, step: int = 0, mode: str = "local", reduce: str = "max") -> Tensor:
        """Read drift on the grid of KV heads: the largest of a group's query heads, or the mean. float32 [L, H]."""
        values = (self.local if mode == "local" else self.propagated).values[name][step]
        grouped = values.unflatten(-1, (self.status.shape[1], -1))
        return grouped.amax(-1) if reduce == "max" else grouped.mean(-1)

    def summary(self) -> dict[str, Any]:
        """Median, 95th percentile and largest together, because a mean hides the one head that broke; coverage and retained
        mass beside them, because a distance says nothing of what is gone; with and without sinks; and the floor's largest.
        """
        out: dict[str, Any] = {
            "recipe": self.recipe,
            "reference": self.reference,
            "coverage": _spread(self.coverage, low=True),
            "retained": _spread(self.local.values["retained"], low=True),
            "turned_keys": self.turned_keys,
            "stored": {name: _spread(x, low=name.endswith("cosine")) for name, x in self.stored.items()},
            "stored_without_sinks": {
                name: _spread(x[..., SINKS:], low=name.endswith("cosine")) for name, x in self.stored.items()
            },
            "frobenius": {name: _spread(x) for name, x in self.frobenius.items()},
        }
        for mode, reads in (("local", self.local), ("propagated", self.propagated)):
            values = {name: _spread(x) for name, x in reads.values.items() if not name.startswith("signed_")}
            out[mode] = {**values, "layer_error": _spread(reads.layer_error)}
        if self.floor is not None:
            out["floor"] = {
                "stored": {
                    name: _spread(x, low=name.endswith("cosine"))["worst"] for name, x in self.floor.stored.items()
                },
                "local": {name: _spread(x)["worst"] for name, x in self.floor.local.values.items()},
                "propagated": {name: _spread(x)["worst"] for name, x in self.floor.propagated.values.items()},
            }
        return out

    def as_dict(self) -> dict[str, Any]:
        """The summary, and per layer and head what a heat map shows."""
        steps = self.local.layer_error.shape[0]
        return {
            **self.summary(),
            "steps": steps,
            "status_counts": {s.name.lower(): int((self.status == s).sum()) for s in Status},
            "layer_error": {
                "local": self.local.layer_error.tolist(),
                "propagated": self.propagated.layer_error.tolist(),
            },
            "heads": {
                name: self.local.values[name][0].tolist()
                for name in ("retained", "output_relative_l2", "signed_lost", "signed_gain", "signed_changed")
            },
        }

    def __repr__(self) -> str:
        found = self.summary()
        floor = "" if self.floor is None else f" (floor {found['floor']['local']['output_relative_l2']:.2g})"
        output, kept = found["local"]["output_relative_l2"], found["coverage"]
        return (
            f"{self.recipe} against {self.reference}: holds {kept['p50']:.1%} of the tokens, retains "
            f"{found['retained']['p50']:.1%} of the attention (least {found['retained']['worst']:.1%}); local output error "
            f"median {output['p50']:.3g}, largest {output['worst']:.3g}{floor}"
        )


def collect(
    recipe: str, reference: str, heads: list[list[HeadDrift]], local: Reads, propagated: Reads,
    decoded: tuple[Tensor, Tensor], turned_keys: bool,
) -> Drift:  # fmt: skip
    """One table from the heads [L][H]."""
    stored = {}
    for prefix, part in (("key", "keys"), ("centred_key", "centred"), ("value", "values")):
        for name in VectorDrift.__dataclass_fields__:
            rows = [[getattr(getattr(head, part), name) for head in layer] for layer in heads]
            stored[f"{prefix}_{name}"] = torch.stack([torch.stack(row) for row in rows])
    frobenius = {
        name: torch.tensor([[head.frobenius[name] for head in layer] for layer in heads])
        for name in ("keys", "centred", "values")
    }
    status = torch.stack([torch.stack([head.status for head in layer]) for layer in heads])
    return Drift(recipe, reference, status, stored, frobenius, local, propagated, *decoded, turned_keys)


def _spread(x: Tensor, low: bool = False) -> dict[str, float | None]:
    """``p50``, ``p95`` and ``worst`` of what is a number; with ``low``, small is bad and p95 counts from below."""
    known = x[~x.isnan()].flatten().double()
    if not len(known):
        return {"p50": None, "p95": None, "worst": None}
    far, worst = (0.05, known.min()) if low else (0.95, known.max())
    ranked = known.sort().values
    pick = [ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in (0.5, far)]
    return {"p50": float(pick[0]), "p95": float(pick[1]), "worst": float(worst)}

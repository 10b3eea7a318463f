"""Layers x heads as a heat map: which heads matter, or changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import traitlets as t

from workbench_widgets.base import Component, Publisher, as_array, module_text


class ShowsHeads(Publisher):
    """`show` of the head matrix, for both hosts."""

    def show(
        self,
        grid: Any,
        metric: str = "kept share",
        unit: str = "%",
        low: float | None = None,
        high: float | None = None,
        log: bool = False,
        head_label: str = "KV",
        heads_per_kv: int = 1,
        signs: Any = None,
        sign_names: Sequence[str] = ("kept", "dropped"),
    ) -> None:
        """Draw one number per layer and head.

        grid: [layers, heads], any array or tensor; NaN means "not applicable" and is hatched.
        metric: what the numbers are, in words.
        unit: "%" takes fractions (0.25 is shown as 25 %), "bytes" picks KiB, MiB or GiB, any other is named as it is.
        low, high: ends of the colour range, in the grid's own numbers; give both to compare two matrices. Without
            them "%" is 0 to 1, other units run from 0 (or their smallest number, if below 0 or `log`) to their largest.
        log: colour by the logarithm; the range must lie above 0.
        head_label: "KV" for KV heads, "H" for query heads; `heads_per_kv` > 1 brackets the query heads of a KV head.
        signs: [layers, heads] of 0 (nothing), 1 (a disc) and 2 (a cross), drawn in the cells whatever their colour;
            `sign_names` says what disc and cross mean.
        """
        values = as_array(grid, "<f4")
        if values.ndim != 2:
            raise ValueError(f"HeadMatrix.show takes a grid [layers, heads], got shape {values.shape}")
        if heads_per_kv < 1:
            raise ValueError(f"heads_per_kv is a count of at least 1, got {heads_per_kv}")
        drawn = as_array(np.zeros((0, 0)) if signs is None else signs, "u1")
        if signs is not None and (drawn.shape != values.shape or drawn.max(initial=0) > 2):
            raise ValueError(f"signs takes 0, 1 or 2 for each cell of {values.shape}, got shape {drawn.shape}")
        known = values[np.isfinite(values) & ((values > 0) | (not log))].astype(float)
        if low is None:
            low = 0.0 if unit == "%" and not log else known.min(initial=np.inf if log else 0.0)
        if high is None:
            high = 1.0 if unit == "%" else known.max(initial=-np.inf)
            if not np.isfinite(high) or high <= low:  # nothing known, or all the same
                high = low + abs(low) + 1.0 if np.isfinite(low) else 1.0
        if not np.isfinite(low):
            low = high / 10
        if not (np.isfinite(high) and low < high):
            raise ValueError(f"the colour range needs finite low < high, got low={low}, high={high}")
        if log and low <= 0:
            raise ValueError(f"a logarithmic colour range lies above 0, got low={low}")
        self._publish(
            values=values.tobytes(),
            shape=list(values.shape),
            metric=metric,
            unit=unit,
            low=float(low),
            high=float(high),
            log_scale=log,
            head_label=head_label,
            heads_per_kv=heads_per_kv,
            signs=drawn.tobytes(),
            sign_names=list(sign_names),
        )


class HeadMatrix(ShowsHeads, Component):
    """Layers x heads as a heat map, in Jupyter. A click or Enter sets `selected` to {"n", "layer", "head"}."""

    _esm = module_text(Path(__file__).with_name("index.js"))

    values = t.Bytes(b"", help="float32 [layers, heads], row by row").tag(sync=True)
    shape = t.List(t.Int(), [0, 0], help="[layers, heads]").tag(sync=True)
    metric = t.Unicode("kept share").tag(sync=True)
    unit = t.Unicode("%").tag(sync=True)
    low = t.Float(0.0).tag(sync=True)
    high = t.Float(1.0).tag(sync=True)
    log_scale = t.Bool(False).tag(sync=True)
    head_label = t.Unicode("KV").tag(sync=True)
    heads_per_kv = t.Int(1).tag(sync=True)
    signs = t.Bytes(b"", help="uint8 [layers, heads]: 0 nothing, 1 a disc, 2 a cross; or empty").tag(sync=True)
    sign_names = t.List(t.Unicode(), ["kept", "dropped"], help="what disc and cross mean").tag(sync=True)
    picked = t.List(t.Int(), [], help="[layer, head] that is outlined, or empty").tag(sync=True)
    hint = t.Unicode("No values per head yet: run a lane to see them.").tag(sync=True)

"""The calibrations by the method that needs them: what is measured, and what of it becomes the artifact."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from workbench.calibration.channels import measure_channels
from workbench.calibration.layer_errors import measure_errors
from workbench.calibration.needles import measure_heads
from workbench.errors import ArtifactError
from workbench.strategies.eviction.allocators import compresskv, headkv
from workbench.strategies.quantization import rotatekv

if TYPE_CHECKING:
    from workbench.models.artifacts import Artifact
    from workbench.models.load import Model

Told = Callable[[str, int, int], None]  # what is being measured, done, of how many


def calibrate_compresskv(model: Model, samples: int, tell: Told) -> Artifact:
    """Semantic retrieval heads from needle runs, then layer errors with these heads."""
    kind, layers = compresskv.CALIBRATION, model.geometry.num_layers
    heads = measure_heads(model, samples, lambda done, total: tell("heads", done, total))
    semantic = heads.semantic / heads.counted
    draft = model.artifacts.make(kind, {"semantic": semantic, "errors": torch.full((layers,), 1 / layers)}, {})
    holding = model.artifacts.holding(draft)
    errors = measure_errors(model, samples, holding, lambda done, total: tell("layers", done, total))
    made_with = {"samples": samples, "needles_answered": heads.counted}
    return model.artifacts.make(kind, {"semantic": semantic, "errors": errors}, made_with)


def calibrate_headkv(model: Model, samples: int, tell: Told) -> Artifact:
    """How often each head looks at the token that is copied, from needle runs."""
    heads = measure_heads(model, samples, lambda done, total: tell("heads", done, total))
    if not bool(heads.retrieval.any()):
        raise ArtifactError(
            f"No head of {model.id} looked at the tokens it copied in {heads.counted} needle runs; ask for more --samples, "
            "or use adakv, which needs no calibration."
        )
    made_with = {"samples": samples, "needles_answered": heads.counted}
    return model.artifacts.make(headkv.CALIBRATION, {"retrieval": heads.retrieval / heads.counted}, made_with)


def calibrate_rotatekv(model: Model, samples: int, tell: Told) -> Artifact:
    """How large the channels of rotated keys are."""
    model.geometry.ropes.require("rotatekv")
    found = measure_channels(model, samples, lambda done, total: tell("channels", done, total))
    return model.artifacts.make(rotatekv.CALIBRATION, found, {"samples": samples})


CALIBRATIONS: dict[str, Callable[[Model, int, Told], Artifact]] = {
    "compresskv": calibrate_compresskv,
    "headkv": calibrate_headkv,
    "rotatekv": calibrate_rotatekv,
}

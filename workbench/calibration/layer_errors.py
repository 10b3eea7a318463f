"""How much each layer's attention output suffers from a very small cache, while the model generates with the full one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.calibration.needles import Told
from workbench.errors import ArtifactError
from workbench.evaluation import tasks
from workbench.models.projections import output_weight
from workbench.runs.decode import end_tokens
from workbench.runs.prompt import forward
from workbench.runs.reference import QueryRecorder
from workbench.strategies.eviction.compresskv import CompressKV
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query
    from workbench.models.artifacts import Artifacts
    from workbench.models.load import Model

SMALL = 32  # tokens that the small cache keeps of the prompt, 8 of them the window (CompressKV's card, B)
MOST_TOKENS = 32  # generated
EPSILON = 1e-5  # as in the paper's code
FIRST_SEED = 8_000_000  # prompts of no evaluation

TASKS: dict[str, Callable[[Model, int], tasks.Example]] = {
    "needle": lambda model, seed: tasks.needle(model, 500, (seed % 10) / 9, seed),
    "table": lambda model, seed: tasks.table_lookup(model, seed=seed),
    "variables": lambda model, seed: tasks.variable_tracking(model, seed=seed),
    "copying": lambda model, seed: tasks.copying(model, seed=seed),
    "prose": lambda model, seed: tasks.free_text(model, seed=seed),
}


@dataclass
class OutputError:
    """A probe of a full cache: what a small cache of the same tokens would have attended to instead.

    ``total`` sums, per layer, |small - full| / (|full| + epsilon) of the outputs after projection.
    """

    small: WorkbenchCache
    total: list[float]

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        store = self.small.layers[layer.index].store
        fresh = query.q.shape[2]
        store.append(layer.store.keys()[:, :, -fresh:], layer.store.values()[:, :, -fresh:], query.start)
        assert layer.module is not None  # it is attending
        weight = output_weight(layer.module, out.shape[1]).float()  # [Hq, D, hidden]
        full, small = (torch.einsum("bhtd,hde->bte", heads.float(), weight) for heads in (out, store.attend(query)))
        self.total[layer.index] += float((small - full).norm() / (full.norm() + EPSILON))


def prompt_errors(model: Model, ids: list[int], artifacts: Artifacts) -> list[float]:
    """Errors per layer, summed over the tokens that the model says after a prompt."""
    part = CompressKV(budget=SMALL, most=1.0)
    recorder = QueryRecorder(part.query_window)
    cache = WorkbenchCache(Recipe(), model.geometry, len(ids), [recorder], artifacts)
    logits = forward(model, cache, ids)
    small = cache.clone(Recipe((part,)))
    with torch.inference_mode():
        small.apply_recipe(recorder.take())
    probe = OutputError(small, [0.0] * model.geometry.num_layers)
    cache.probes = [probe]
    ends = end_tokens(model)
    for _ in range(MOST_TOKENS):
        token = int(logits.argmax())
        logits = forward(model, cache, [token])
        if token in ends:
            break
    return probe.total


def calibration_prompts(model: Model, samples: int) -> Iterator[tuple[str, list[int]]]:
    """Prompts of every task in turn; those too long for the model are left out."""
    for number in range(samples):
        name = list(TASKS)[number % len(TASKS)]
        ids = model.tokenizer.encode(TASKS[name](model, FIRST_SEED + number // len(TASKS)).prompt)
        if SMALL < len(ids) < model.geometry.max_positions - MOST_TOKENS:
            yield name, ids


def measure_errors(model: Model, samples: int, artifacts: Artifacts, tell: Told) -> Tensor:
    """Errors [L] that sum to 1: the mean over the tasks, each made to sum to 1 first.

    Args:
        artifacts: of the model, with the semantic retrieval heads.

    Raises:
        ArtifactError: no prompt fits the model.
    """
    by_task: dict[str, Tensor] = {}
    prompts = list(calibration_prompts(model, samples))
    for done, (name, ids) in enumerate(prompts, 1):
        errors = torch.tensor(prompt_errors(model, ids, artifacts))
        by_task[name] = by_task.get(name, 0.0) + errors
        tell(done, len(prompts))
    if not by_task:
        raise ArtifactError(
            f"No calibration prompt fits {model.id}, which reads at most {model.geometry.max_positions:,} tokens; use "
            "snapkv, which needs no calibration."
        )
    shares = torch.stack([errors / errors.sum().clamp_min(EPSILON) for errors in by_task.values()])
    mean = shares.mean(0)
    return mean / mean.sum()

"""How often the house model still answers under every eviction method: recall over budgets, the question seen or not.

Query-aware, the question is part of the prompt that is compressed; query-agnostic, the context is compressed first and the
question fed then. The first token of an answer comes from the compressed cache. Documents are held out (their keys are words
that training never saw), and an answer counts when it is exact. Every method runs with its defaults but for the budget.

Beside the answers stands why: which share of the answer's own tokens is still held by the head through which the model
looks answers up, as `kvw calibrate headkv` found it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workbench.bench.subjects import HOUSE_NAME, house_is_there, subject
from workbench.errors import ArtifactError, WorkbenchError
from workbench.models.load import Model
from workbench.runs.compare import compare
from workbench.runs.lane import Lane
from workbench.strategies.eviction.allocators.headkv import CALIBRATION
from workbench.strategies.recipe import Recipe
from workbench.strategies.registry import registry
from workbench.training.recall import text

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
MODES = ("query-aware", "query-agnostic")
TOKENS, SAMPLES = 512, 100
FIRST_SEED = 5_000_000  # apart from the documents of the model card


def eviction_methods() -> list[str]:
    """The eviction methods that have a budget: all but ThinK, which drops channels and no token."""
    return [key for key, cls in registry().items() if cls.family == "eviction" and "budget" in cls.parameter_names()]


def measure_accuracy(
    methods: Sequence[str] | None, samples: int | None, quick: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Right answers by method, mode and budget.

    Returns:
        ``full``: mode -> right answers of the full cache; ``methods``: name -> mode -> right answers by budget, of
        ``samples`` documents; ``retrieval_head``: [layer, KV head]; ``evidence``: as ``methods``, the mean share of the
        fact's tokens that this head still holds after compression; ``left_out``: name -> why. ``skipped`` instead of all
        this where there is no house model.
    """
    if not house_is_there():
        return {"skipped": "the house model's weights are not installed"}
    model = subject(HOUSE_NAME)
    samples = samples or (2 if quick else SAMPLES)
    budgets, tokens = (BUDGETS[-1:], 256) if quick else (BUDGETS, TOKENS)
    ready, left_out = runnable(model, methods or eviction_methods())
    head = retrieval_head(model)
    right = {name: {mode: [0] * len(budgets) for mode in MODES} for name in ready}
    evidence = {name: {mode: [0.0] * len(budgets) for mode in MODES} for name in ready}
    full = dict.fromkeys(MODES, 0)
    for number in range(samples):
        if number % 10 == 0:
            tell(f"accuracy: {number} of {samples} documents")
        document = text.document(FIRST_SEED + number, tokens, model.tokenizer)
        lanes = {(name, i): recipe(name, budget, number) for name in ready for i, budget in enumerate(budgets)}
        for mode in MODES:
            first, *rest = answered(model, document, ["full", *lanes.values()], mode)
            full[mode] += document.is_answered_by(first.text)
            for (name, i), lane in zip(lanes, rest, strict=True):
                right[name][mode][i] += document.is_answered_by(lane.text)
                evidence[name][mode][i] += survival(document, lane, head)
    return {
        "model": model.id,
        "dtype": model.geometry.dtype,
        "tokens": tokens,
        "samples": samples,
        "budgets": list(budgets),
        "full": full,
        "methods": right,
        "retrieval_head": list(head),
        "evidence": {
            name: {mode: [round(total / samples, 4) for total in by_budget] for mode, by_budget in by_mode.items()}
            for name, by_mode in evidence.items()
        },
        "left_out": left_out,
    }


def recipe(name: str, budget: float, number: int) -> str:
    """A method's lane for document ``number``; a random choice is another one in every document."""
    return f"{name}(budget={budget}, seed={number})" if name == "random" else f"{name}(budget={budget})"


def runnable(model: Model, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The methods that can run on the model, and why the others cannot: what must be made for them first."""
    ready, left_out = [], {}
    for name in names:
        try:
            Recipe.parse(name).check(model.geometry, model.artifacts)
        except ArtifactError as error:
            left_out[name] = str(error)
        else:
            ready.append(name)
    return ready, left_out


def answered(model: Model, document: text.Document, lanes: Sequence[str], mode: str) -> list[Lane]:
    """The lanes, run: their answers to the document's question, and what they kept."""
    aware = mode == "query-aware"
    answer = model.encode(f" {document.answer} .", continues=True)  # what comes after it changes no judgement
    comparison = compare(
        model,
        document.prompt if aware else document.context,
        lanes,
        question=None if aware else document.question,
        max_new_tokens=len(answer),
        probes=[],
        first_token="replayed",
        reuse_prompt=True,
    )
    for lane in comparison.lanes:
        if lane.error is not None:
            raise WorkbenchError(f"The lane {lane.recipe} failed: {lane.error}")
    return comparison.lanes


def retrieval_head(model: Model) -> tuple[int, int]:
    """The layer and KV head whose query heads looked most often at what is copied, by HeadKV's calibration."""
    retrieval = model.artifacts.get(CALIBRATION, "").tensors["retrieval"]  # [L, Hq]
    by_group = retrieval.unflatten(1, (model.geometry.num_kv_heads, -1)).mean(2)  # [L, H]
    layer, head = divmod(int(by_group.argmax()), model.geometry.num_kv_heads)
    return layer, head


def survival(document: text.Document, lane: Lane, head: tuple[int, int]) -> float:
    """Share of the fact's tokens that a head still holds after the compression."""
    start, stop = document.evidence_tokens
    kept = lane.kept(*head)
    return sum(start <= position < stop for position in kept) / (stop - start)

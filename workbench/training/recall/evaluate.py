"""Measure `house/recall`: `python -m workbench.training.recall.evaluate [--out FILE.json] [--card]`.

Accuracy by context length and by depth of the fact, copying, and how far each strategy keeps the answer. All documents are held out:
their keys are words that training never saw. `--card` writes the tables into the model card.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import param
import torch
from torch import Tensor

import workbench as wb
from workbench.cache.layer import LayerView
from workbench.strategies.eviction.base import Eviction
from workbench.strategies.recipe import Recipe

from . import text
from .batches import Encoder
from .text import Document, Role

LENGTHS = (256, 512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER_TOKENS = 24  # more than the longest answer
FIRST_SEED = 1_000_000  # evaluation documents; any seed would do, training draws from another stream
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


class WithoutEvidence(Eviction):
    """Evict exactly the given span of tokens from every layer and head, and nothing else."""

    key = "without_evidence"
    title = "the fact's own tokens evicted"

    start = param.Integer(0, bounds=(0, None), doc="first token to evict")
    stop = param.Integer(0, bounds=(0, None), doc="the token after the last one to evict")

    def after_prefill(self, view: LayerView) -> None:
        positions = view.positions()[0, 0]
        index = torch.nonzero((positions < self.start) | (positions >= self.stop)).flatten()
        self.keep(view, index.expand(*view.positions().shape[:2], -1))

    def score(self, view: LayerView) -> Tensor:
        positions = view.positions()
        return ((positions < self.start) | (positions >= self.stop)).float()


def strategies(document: Document, seed: int) -> dict[str, str | Recipe]:
    """The rows of the card's table; the last one depends on where the document's evidence is."""
    start, stop = document.evidence_tokens
    return {
        "full": "full",
        "snapkv(budget=0.5)": "snapkv(budget=0.5)",
        "snapkv(budget=0.25)": "snapkv(budget=0.25)",
        "snapkv(budget=0.1, window=16)": "snapkv(budget=0.1, window=16)",
        "tova(budget=0.25)": "tova(budget=0.25)",
        "streaming_llm(budget=0.25)": "streaming_llm(budget=0.25)",
        "knorm(budget=0.25)": "knorm(budget=0.25)",
        "random(budget=0.25)": f"random(budget=0.25, seed={seed})",
        "all but the fact": Recipe((WithoutEvidence(start=start, stop=stop),), "all but the fact"),
    }


def answers(model: wb.Model, document: Document, lanes: dict[str, str | Recipe]) -> dict[str, bool]:
    """Whether each lane answers exactly, the question being part of the prompt and the first token asked of the compressed cache."""
    ids = list(document.prompt_ids)
    comparison = wb.compare(
        model,
        ids,
        list(lanes.values()),
        max_new_tokens=ANSWER_TOKENS,
        probes=[],
        first_token="replayed",
        reuse_prompt=True,
    )
    found = {}
    for name, lane in zip(lanes, comparison.lanes):
        if lane.error is not None:
            raise RuntimeError(f"The lane {name} failed: {lane.error}")
        found[name] = document.is_answered_by(lane.text)
    return found


def by_length(
    model: wb.Model, samples: int, say: Callable[[str], None]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Prompt length -> [right, asked], facts at any depth; and the same by the kind of answer, over all lengths."""
    lengths: dict[str, list[int]] = {}
    kinds: dict[str, list[int]] = {}
    for length in LENGTHS:
        row = lengths[str(length)] = [0, 0]
        for i in range(samples):
            document = text.document(FIRST_SEED + i, length, model.tokenizer)
            good = answers(model, document, {"full": "full"})["full"]
            for pair in (row, kinds.setdefault(document.kind, [0, 0])):
                pair[0] += good
                pair[1] += 1
        say(f"{length} tokens: {row}")
    return lengths, dict(sorted(kinds.items()))


def by_depth(model: wb.Model, samples: int, say: Callable[[str], None]) -> dict[str, dict[str, list[int]]]:
    """Context length -> depth of the fact -> [right, asked]."""
    table: dict[str, dict[str, list[int]]] = {}
    for length in (512, 1024, 2048):
        row = table[str(length)] = {}
        for depth in DEPTHS:
            documents = [
                text.document(2 * FIRST_SEED + i, length, model.tokenizer, depth=depth) for i in range(samples)
            ]
            row[str(depth)] = [sum(answers(model, d, {"full": "full"})["full"] for d in documents), samples]
        say(f"{length} tokens by depth: {row}")
    return table


@torch.no_grad()
def copying(model: wb.Model, samples: int) -> list[int]:
    """[right, asked] tokens in the second half of repeated random words, given everything before each."""
    encoder = Encoder(model.tokenizer)
    rng = random.Random("copying")
    right = asked = 0
    for _ in range(samples):
        e = encoder.encode(text.repetition(rng, 20, 200))
        best = (
            model.network(input_ids=torch.tensor([e.ids], device=model.device), use_cache=False)
            .logits[0]
            .argmax(-1)
            .tolist()
        )
        again = [i for i, role in enumerate(e.roles) if role == Role.COPY][
            3:
        ]  # where the copy begins cannot be known at once
        right += sum(best[i - 1] == e.ids[i] for i in again)
        asked += len(again)
    return [right, asked]


def by_strategy(model: wb.Model, samples: int, say: Callable[[str], None]) -> dict[str, list[int]]:
    """Strategy -> [right, asked] on 512-token documents, the question seen."""
    table: dict[str, list[int]] = {}
    for i in range(samples):
        document = text.document(3 * FIRST_SEED + i, 512, model.tokenizer)
        for name, good in answers(model, document, strategies(document, i)).items():
            row = table.setdefault(name, [0, 0])
            row[0] += good
            row[1] += 1
    say(f"strategies: {table}")
    return table


def measure(model: wb.Model, samples: int = 100, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """All tables; `samples` documents for each length and for the strategies, a quarter for each depth and for copying."""
    with torch.inference_mode():
        copied = copying(model, max(4, samples // 4))
        say(f"copying: {copied}")
        lengths, kinds = by_length(model, samples, say)
        return {
            "samples": samples,
            "copying": copied,
            "by_length": lengths,
            "by_kind": kinds,
            "by_strategy": by_strategy(model, samples, say),
            "by_depth": by_depth(model, max(4, samples // 4), say),
        }


def _share(pair: list[int]) -> str:
    return f"{100 * pair[0] / pair[1]:.1f} %"


def tables(result: dict[str, Any]) -> str:
    """The measured tables in Markdown."""
    n = result["samples"]
    lines = [f"Exact answers on held-out documents, full cache, greedy, {n} documents a length:", ""]
    lines += ["| prompt tokens | exact |", "|---|---|"]
    lines += [f"| {length} | {_share(pair)} |" for length, pair in result["by_length"].items()]
    lines += ["", "By kind of answer, over these lengths:", "", "| asked for | exact | documents |", "|---|---|---|"]
    lines += [f"| {kind} | {_share(pair)} | {pair[1]} |" for kind, pair in result["by_kind"].items()]
    depths = next(iter(result["by_depth"].values()))
    each = next(iter(depths.values()))[1]
    lines += [
        "",
        f"The same by depth of the fact (0 is the beginning, 1 right before the question), {each} documents a cell:",
        "",
    ]
    lines += ["| prompt tokens | " + " | ".join(depths) + " |", "|---" * (len(depths) + 1) + "|"]
    lines += [
        f"| {length} | " + " | ".join(_share(p) for p in row.values()) + " |"
        for length, row in result["by_depth"].items()
    ]
    lines += ["", f"Copying repeated random words: {_share(result['copying'])} of {result['copying'][1]:,} tokens.", ""]
    lines += [f"Strategies on 512-token documents, question seen, first token replayed, {n} documents:", ""]
    lines += ["| cache kept | exact |", "|---|---|"]
    lines += [
        f"| `{name}` | {_share(pair)} |" if "(" in name or name == "full" else f"| {name} | {_share(pair)} |"
        for name, pair in result["by_strategy"].items()
    ]
    return "\n".join(lines)


def fill(card: Path, result: dict[str, Any]) -> None:
    """Replace the measured part of a model card."""
    old = card.read_text(encoding="utf-8")
    new, count = re.subn(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{tables(result)}\n{END}", old, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{card} has no part between {BEGIN} and {END} to fill.")
    card.write_text(new, encoding="utf-8")


def _main() -> None:
    parser = argparse.ArgumentParser(description="Measure house/recall.")
    parser.add_argument("--model", default="house/recall", help="house name or folder")
    parser.add_argument("--samples", type=int, default=100, help="documents a length")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--card", type=Path, help="fill the tables of this model card")
    given = parser.parse_args()
    result = measure(wb.load(given.model), given.samples, lambda line: print(line, flush=True))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.card:
        fill(given.card, result)
    print(tables(result))


if __name__ == "__main__":
    _main()

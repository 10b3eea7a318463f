"""Needle runs: which heads read the passage that holds the answer, and which look at the very token that is copied.

Axes: L layers, Hq query heads, T generated tokens, n entries.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.errors import ArtifactError
from workbench.evaluation.tasks import fast_tokenizer
from workbench.inspection.why import reference_attention
from workbench.runs.decode import end_tokens
from workbench.runs.prompt import forward
from workbench.strategies.recipe import Recipe
from workbench.training.recall import text

if TYPE_CHECKING:
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query
    from workbench.models.load import Model

LENGTHS = (256, 512, 1024)  # tokens of a prompt; the papers take 1k to 50k, for larger models
DEPTHS = 10  # places of the needle, from the beginning to the end
MOST_TOKENS = 50  # generated (CompressKV's card, A)
ENOUGH = 0.5  # of the answer's words must be said for a run to count (the same)
FIRST_SEED = 7_000_000  # documents of no evaluation, and about words that training saw

Told = Callable[[int, int], None]  # done, of how many


@dataclass
class HeadScores:
    """Sums over the runs that count, [L, Hq] each.

    Attributes:
        semantic: attention to the whole needle while saying tokens of it (CompressKV).
        retrieval: how often a head's strongest attention is on the very token that is said (HeadKV), by needle length.
        counted: runs whose answer was right enough; asked: all runs.
    """

    semantic: Tensor
    retrieval: Tensor
    counted: int = 0
    asked: int = 0


@dataclass
class AttentionRecorder:
    """A probe that keeps the weights of each layer's last query over all tokens seen."""

    weights: dict[int, Tensor] = field(default_factory=dict)

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        rows = []
        for row in range(layer.store.heads):
            weights, at = reference_attention(layer, query, row)  # [G, n], and the positions of the entries
            rows.append(weights.new_zeros(len(weights), query.stop).index_copy(1, at.long(), weights))
        self.weights[layer.index] = torch.cat(rows)

    def take(self) -> Tensor:
        """[L, Hq, tokens seen] on the CPU."""
        taken = torch.stack([self.weights[layer] for layer in sorted(self.weights)]).cpu()
        self.weights = {}
        return taken


def semantic_score(said: Sequence[int], needle: Sequence[int], attention: Tensor) -> Tensor:
    """Sum over the tokens said of the attention to the needle, once for every place where the token stands in it.

    (As CompressKV's code counts; its paper counts a token that stands there twice once.)

    Args:
        said: T token ids; needle: those of the passage.
        attention: [T, …] paid to the whole needle while each was said.
    """
    stands = Counter(needle)
    times = torch.tensor([stands[token] for token in said], dtype=attention.dtype)
    return torch.einsum("t,t...->...", times, attention)


def retrieval_score(said: Sequence[int], prompt: Sequence[int], span: tuple[int, int], strongest: Tensor) -> Tensor:
    """How often the entry a head looked at most lies in the needle and is the token said, over the needle's length.

    Args:
        span: [start, end) of the needle in ``prompt``.
        strongest: int64 [T, …] position of each head's largest weight.
    """
    start, stop = span
    ids = torch.tensor([*prompt, *said])
    inside = (strongest >= start) & (strongest < stop)
    same = ids[strongest] == torch.tensor(said).view(-1, *[1] * (strongest.ndim - 1))
    return (inside & same).sum(0).float() / (stop - start)


def word_recall(answer: str, said: str) -> float:
    """Share of the answer's words that were said, each as often as it stands there (ROUGE-1 recall)."""
    wanted, found = (Counter(re.findall(r"\w+", words.lower())) for words in (answer, said))
    return sum((wanted & found).values()) / max(1, sum(wanted.values()))


def greedy(model: Model, cache: WorkbenchCache, ids: Sequence[int], most: int) -> Iterator[int]:
    """Feed a prompt, its last token alone, then what the model says, which is yielded token by token."""
    forward(model, cache, list(ids[:-1]))
    token, ends = ids[-1], end_tokens(model)
    for _ in range(most):
        token = int(forward(model, cache, [token]).argmax())
        yield token
        if token in ends:
            return


def needle_documents(model: Model, samples: int) -> Iterator[text.Document]:
    """Documents of every length that the model can read, at every depth in turn."""
    tokenizer = fast_tokenizer(model)
    lengths = [length for length in LENGTHS if length + MOST_TOKENS < model.geometry.max_positions] or [96]
    for number in range(samples):
        length = lengths[number % len(lengths)]
        depth = number // len(lengths) % DEPTHS / (DEPTHS - 1)
        yield text.document(FIRST_SEED + number, length, tokenizer, depth=depth, held_out=False)


def measure_heads(model: Model, samples: int, tell: Told) -> HeadScores:
    """Ask ``samples`` documents with the full cache and score every head by what it read.

    Raises:
        ArtifactError: the model answered none of them.
    """
    shape = model.geometry.num_layers, model.geometry.num_heads
    scores = HeadScores(torch.zeros(shape), torch.zeros(shape))
    for document in needle_documents(model, samples):
        ids, (start, stop) = document.prompt_ids, document.evidence_tokens
        recorder = AttentionRecorder()
        cache = WorkbenchCache(Recipe(), model.geometry, len(ids) - 1, [recorder])
        said, attention, strongest = [], [], []
        for token in greedy(model, cache, ids, MOST_TOKENS):
            weights = recorder.take()  # of the query that led to this token
            said.append(token)
            attention.append(weights[:, :, start:stop].sum(-1))
            strongest.append(weights.argmax(-1))
        scores.asked += 1
        if word_recall(document.answer, model.decode(said)) > ENOUGH:
            scores.counted += 1
            scores.semantic += semantic_score(said, ids[start:stop], torch.stack(attention))
            scores.retrieval += retrieval_score(said, ids, (start, stop), torch.stack(strongest))
        tell(scores.asked, samples)
    if not scores.counted:
        raise ArtifactError(
            f"{model.id} answered none of {samples} needle prompts, so its retrieval heads cannot be told; calibrate a "
            "model that recalls, or use a method that needs no calibration, for example snapkv."
        )
    return scores

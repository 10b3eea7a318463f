"""Train Locret's retaining heads for a model on the house text: what will the queries of questions and answers want?

The model stays as it is. The data of a step depends only on the seed and the step, so a resumed run equals one that was never
interrupted. Axes: L layers, Hq query heads, H KV heads, G group, P tokens of the prefix, A tokens after it, D head_dim,
X = (Hq + 2H) * D, W width.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.errors import ModelError
from workbench.runs.prompt import forward
from workbench.strategies.eviction.locret import HEADS, features, retain
from workbench.strategies.recipe import Recipe
from workbench.training.recall import checkpoint, text
from workbench.training.recall.text import Role

if TYPE_CHECKING:
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query
    from workbench.models.artifacts import Artifact
    from workbench.models.geometry import Geometry
    from workbench.models.load import Model

STEPS, WARM_UP = 3000, 2 / 3  # one text each; the share of them in which the rate rises (card)
RATE, BETAS, CLIP = 5e-4, (0.9, 0.95), 0.5  # AdamW, and the largest gradient value (card)
SMOOTHING = 0.0025  # weight of the difference between neighbouring tokens' scores (card)
WIDEST = 1024  # of the hidden layer (card)
LEVEL = 5  # of the house text: 200 to 1,000 tokens, many facts, all forms of questions
LONGEST = 2048  # tokens of a training text
TRIES = 200  # texts drawn until one fits the model
MEASURED_ON = 32  # texts, none of them trained on
MEMORY = 0.98  # of the running means that progress tells


@dataclass
class Progress:
    """What a training run can say about itself. ``overlap`` is of the tenth of the prefix that is wanted most with the
    tenth that scores best; chance gives 0.1. Loss and overlap are running means."""

    step: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    overlap: float = float("nan")
    done: float = 0.0  # 0 to 1

    @property
    def eta(self) -> float:
        """Seconds to go, at the mean pace so far; infinite at the very start."""
        return self.seconds / self.done * (1 - self.done) if self.done > 0 else float("inf")

    def note(self, loss: float, overlap: float) -> None:
        for name, value in (("loss", loss), ("overlap", overlap)):
            mean = getattr(self, name)
            setattr(self, name, value if mean != mean else MEMORY * mean + (1 - MEMORY) * value)


def width_for(geometry: Geometry) -> int:
    """The card's width, or half the hidden size of a smaller model."""
    return min(WIDEST, geometry.hidden_size // 2)


def example(rng: random.Random, model: Model) -> tuple[list[int], int]:
    """Token ids of a training text, and how many are its prefix: all before the first question, or before a copy."""
    most = min(LONGEST, model.geometry.max_positions - 1)
    encode = model.tokenizer.encode
    for _ in range(TRIES):
        pieces = text.training_text(rng, LEVEL, lambda part: len(encode(part, add_special_tokens=False)))
        ids = [] if model.tokenizer.bos_token_id is None else [model.tokenizer.bos_token_id]
        prefix = 0
        for piece in pieces:
            if piece.role != Role.TEXT and not prefix:
                prefix = len(ids)
            ids += encode(piece.text, add_special_tokens=False)
        if prefix > 1 and len(ids) <= most:
            return ids, prefix
    raise ModelError(f"{model.id} reads at most {most + 1} tokens, too few for the training texts of retaining heads.")


def label(logits: Tensor) -> Tensor:
    """How much each token is wanted at most: logits [H, G, A, P] before softmax to [H, P]."""
    return logits.amax((1, 2))


def loss_of(scores: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 over all, and a little of the squared difference of neighbouring tokens, summed over layers: [L, H, P] each."""
    rough = (scores[..., 1:] - scores[..., :-1]).square().mean((1, 2)).sum()
    return F.smooth_l1_loss(scores, wanted) + SMOOTHING * rough


def overlap_of(scores: Tensor, wanted: Tensor) -> float:
    """Share of each head's most wanted tenth of tokens that is among its best-scored tenth."""
    count = max(1, scores.shape[-1] // 10)
    top, best = (x.topk(count).indices for x in (scores, wanted))
    return float((top[..., :, None] == best[..., None, :]).any(-1).float().mean())


@dataclass
class Lesson:
    """A probe of a full cache that reads a text: per layer what a retaining head sees, and what it should say."""

    prefix: int
    seen: list[Tensor] = field(default_factory=list)  # [P, X] each
    wanted: list[Tensor] = field(default_factory=list)  # [H, P] each

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        rope, prefix = layer.cache.geometry.ropes[layer.index], self.prefix
        q, k, v = query.q, layer.store.keys(), layer.store.values()
        at = torch.arange(prefix, device=q.device)
        bare_q, bare_k = (rope.unrotate(x[:, :, :prefix], at) for x in (q, k))
        self.seen.append(features(bare_q, bare_k, v[:, :, :prefix])[0])
        later = q[0, :, prefix:].unflatten(0, (k.shape[1], -1)).float()  # [H, G, A, D]
        logits = torch.einsum("hgad,hpd->hgap", later, k[0, :, :prefix].float()) * query.scale
        self.wanted.append(label(logits))


def lesson(model: Model, rng: random.Random) -> tuple[Tensor, Tensor]:
    """What the heads see [L, P, X] and should say [L, H, P] of one text."""
    ids, prefix = example(rng, model)
    found = Lesson(prefix)
    forward(model, WorkbenchCache(Recipe(), model.geometry, len(ids), [found]), ids)
    return torch.stack(found.seen), torch.stack(found.wanted)


class Training:
    """One run: the heads, their optimizer and the progress, a step at a time."""

    def __init__(self, model: Model, steps: int, width: int, seed: int) -> None:
        model.geometry.ropes.require("locret")
        self.model, self.steps, self.width, self.seed = model, steps, width, seed
        self.progress = Progress()
        shapes = HEADS.shapes(model.geometry)
        generator = torch.Generator().manual_seed(seed)
        self.heads = {}
        for name in shapes:
            size = [width if axis == "width" else int(axis) for axis in shapes[name]]
            drawn = (torch.rand(size, generator=generator) * 2 - 1) * size[-1] ** -0.5
            self.heads[name] = drawn.to(model.device).requires_grad_()
        self.optimizer = torch.optim.AdamW(self.heads.values(), lr=RATE, betas=BETAS, weight_decay=0.0)

    def state(self) -> dict[str, Any]:
        return {
            "of": self._of(),
            "heads": {name: head.detach() for name, head in self.heads.items()},
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off; ValueError where it is of another run."""
        for name, value in self._of().items():
            if state["of"].get(name) != value:
                raise ValueError(
                    f"The checkpoint was made with {name} {state['of'].get(name)}, not {value}; resume with the same, or start "
                    "without --resume."
                )
        with torch.no_grad():
            for name, head in self.heads.items():
                head.copy_(state["heads"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def _of(self) -> dict[str, Any]:
        return {"model": self.model.content_hash, "steps": self.steps, "width": self.width, "seed": self.seed}

    def step(self) -> None:
        """One update, on one text."""
        p = self.progress
        seen, wanted = lesson(self.model, random.Random(f"locret {self.seed} {p.step}"))
        rising = max(1, int(WARM_UP * self.steps))
        pace = min((p.step + 1) / rising, (self.steps - p.step) / max(1, self.steps - rising))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * pace
        scores = retain(seen, self.heads["w1"], self.heads["w2"])
        loss = loss_of(scores, wanted)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_value_(self.heads.values(), CLIP)
        self.optimizer.step()
        p.step += 1
        p.note(loss.item(), overlap_of(scores.detach(), wanted))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Loss and overlap on texts that no run trains on."""
        losses, overlaps = [], []
        for number in range(MEASURED_ON):
            seen, wanted = lesson(self.model, random.Random(f"locret measured {number}"))
            scores = retain(seen, self.heads["w1"], self.heads["w2"])
            losses.append(float(loss_of(scores, wanted)))
            overlaps.append(overlap_of(scores, wanted))
        return {"loss": sum(losses) / MEASURED_ON, "overlap": sum(overlaps) / MEASURED_ON}

    def artifact(self) -> Artifact:
        """The heads in float16, with what they were made by and how good they are."""
        made_with = {"steps": self.steps, "width": self.width, "seed": self.seed, "text_level": LEVEL}
        tensors = {name: head.detach().half().cpu() for name, head in self.heads.items()}
        return self.model.artifacts.make(HEADS, tensors, {**made_with, "measured": self.measure()})


def train(
    model: Model,
    kept_in: Path,
    steps: int = STEPS,
    width: int | None = None,
    seed: int = 0,
    resume: bool = False,
    tell: Callable[[Progress], None] | None = None,
    save_minutes: float = 3.0,
) -> Artifact:
    """Train retaining heads for ``steps`` texts.

    Args:
        kept_in: file of the checkpoint, written every ``save_minutes`` and at an interruption; ``resume`` goes on from it.
        width: of the hidden layer; by default :func:`width_for` the model.

    Raises:
        ValueError: the checkpoint is missing, damaged, or of another run.
    """
    run = Training(model, steps, width or width_for(model.geometry), seed)
    if resume:
        run.resume(checkpoint.load(kept_in.parent, kept_in.name))
    p = run.progress
    began, saved = time.monotonic() - p.seconds, time.monotonic()
    try:
        while p.step < steps:
            run.step()
            p.seconds, p.done = time.monotonic() - began, p.step / steps
            if tell is not None:
                tell(p)
            if time.monotonic() - saved > 60 * save_minutes:
                checkpoint.save(kept_in.parent, run.state(), kept_in.name)
                saved = time.monotonic()
    finally:
        checkpoint.save(kept_in.parent, run.state(), kept_in.name)
    return run.artifact()

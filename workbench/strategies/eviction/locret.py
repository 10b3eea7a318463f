"""Locret (arXiv 2410.01805): a small trained network says from a token's own query, key and value how much it will be wanted.

Axes: B batch, Hq query heads, H KV heads, T tokens of a chunk, n entries, D head_dim, X = (Hq + 2H) * D, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import param
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.segments import take
from workbench.errors import RecipeError
from workbench.models.artifacts import Kind
from workbench.strategies.base import tokens_kept
from workbench.strategies.eviction.base import Eviction, protect_last

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry

HEADS = Kind(
    method="locret",
    what="set of trained retaining heads",
    suffix=".safetensors",
    command="kvw train locret --model {model}",
    instead="snapkv",
    shapes=lambda g: {
        "w1": (g.num_layers, "width", (g.num_heads + 2 * g.num_kv_heads) * g.head_dim),
        "w2": (g.num_layers, g.num_kv_heads, "width"),
    },
)


class Locret(Eviction):
    """Score = what the layer's retaining head says of the token; it never changes afterwards, so eviction goes on after every
    chunk of the prompt and the cache never holds more than budget + chunk.

    The last `local` tokens are read in one step and stay; before, after each chunk but the last, its newest `stabilizers` stay
    for the time being. Both count within the budget, and are cut to half of it where it is small. Every head keeps its own
    tokens, as many as the others. While generating, nothing is evicted.

    A prompt that comes in one forward call (`generate` without `prefill_chunk_size`) is evicted once, at its end. So are
    sliding-window layers, which let go of old tokens by themselves.
    """

    key = "locret"
    title = "Locret"
    paper = "arXiv 2410.01805"
    summary = "Keeps what a small trained network expects to be wanted, chunk by chunk; needs trained heads."
    scores_alone = False  # it acts within the prompt by its own budget
    artifact_kind = HEADS

    # The defaults are the official code's, for prompts of 100,000 tokens; a short prompt fits in one chunk.
    chunk = param.Integer(3072, bounds=(1, 65536), doc="prompt tokens read between two evictions")
    stabilizers = param.Integer(2500, bounds=(0, 65536), doc="newest tokens of a chunk that stay until the next one")
    local = param.Integer(100, bounds=(0, 4096), doc="last tokens of the prompt, which always stay")
    positions: Any = param.Selector(
        default="original",
        objects=["original", "compacted"],
        doc="what kept keys are turned to: their own positions, or consecutive ones, as in the paper",
    )
    artifact = param.String("", doc="file of trained heads; empty: those that belong to the model", precedence=9)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.allocator is not None:
            raise RecipeError(
                "locret: its scores cannot be compared between heads or layers, so all keep the same number; leave "
                "allocator= out."
            )

    @property
    def needs_prompt(self) -> bool:
        return True

    @property
    def alone(self) -> bool:
        return True

    def check(self, geometry: Geometry) -> None:
        geometry.ropes.require(self.key)

    def shares(self, prompt_length: int) -> tuple[int, int]:
        """The budget of what may be evicted, and the local tokens: the paper's b and n_loc."""
        count = tokens_kept(self.budget, prompt_length)
        local = min(self.local, count // 2)
        return count - local, local

    def cuts(self, prompt_length: int) -> Sequence[int]:
        end = prompt_length - self.shares(prompt_length)[1]
        return [*range(self.chunk, end, self.chunk), end]

    def on_chunk(self, view: LayerView) -> None:
        self.note(view)
        before = view.seen - view.chunk.shape[2]
        passed = [cut for cut in self.cuts(view.prompt_length) if before < cut <= view.seen]
        if passed and view.seen < view.prompt_length and view.window is None:
            self.evict(view, passed[-1])

    def after_prefill(self, view: LayerView) -> None:
        super().after_prefill(view)
        view.state.clear()  # decoding evicts no more

    def evict(self, view: LayerView, cut: int) -> None:
        """Cut the entries before ``cut`` down to the budget; those read beyond it are not judged yet."""
        budget, local = self.shares(view.prompt_length)
        beyond = view.seen - cut
        stable = 0 if cut == view.prompt_length - local else min(self.stabilizers, budget // 2)
        if view.length > budget + beyond:
            scores = protect_last(view.state["scores"], beyond + stable)
            view.note_scores(scores)
            self.keep(view, self.selector_part.pick(scores, budget + beyond))

    def score(self, view: LayerView) -> Tensor:
        local = min(self.shares(view.prompt_length)[1], view.length)
        return protect_last(newest(view.state["scores"], view.length), local)

    def note(self, view: LayerView) -> None:
        """Keep in mind the scores of the chunk's tokens, and where keys will be turned again, these as they were before."""
        q, k, v = before_rope(view)
        fresh = {"scores": self.judge(view, features(q, k, v))}
        if self.turns(view):
            fresh["keys"] = k.to(view.chunk.dtype)
        for name, of_chunk in fresh.items():
            known = view.state.get(name)
            held = view.length - of_chunk.shape[2]  # entries from before this chunk
            view.state[name] = of_chunk if known is None else torch.cat([newest(known, held), of_chunk], 2)

    def judge(self, view: LayerView, x: Tensor) -> Tensor:
        """Scores [B, H, T] of tokens that the layer's retaining head sees as x [B, T, X]."""
        heads = view.artifact(self).tensors
        w1, w2 = (heads[name][view.layer].to(x.device, x.dtype) for name in ("w1", "w2"))
        return retain(x, w1, w2)

    def turns(self, view: LayerView) -> bool:
        """Whether this layer's kept keys take consecutive positions; a sliding window goes by their own."""
        return self.positions == "compacted" and view.window is None

    def keep(self, view: LayerView, index: Tensor | Sequence[Tensor]) -> None:
        assert isinstance(index, Tensor)  # all heads keep the same number
        view.state["scores"] = newest(view.state["scores"], view.length).gather(2, index)
        if not self.turns(view):
            view.keep(index)
            return
        # The newest entry stays next to the token to come; RoPE sees distances only, so the model's own positions may go on.
        bare = take(view.state["keys"], index)
        at = torch.arange(view.seen - index.shape[2], view.seen, device=bare.device)
        view.state["keys"] = bare
        view.keep(index, view.rope.rotate(bare, at).to(view.chunk.dtype))


def retain(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """W2 silu(W1 x): tokens [..., T, X] by w1 [..., W, X] and w2 [..., H, W] to scores [..., H, T].

    SiLU as in the models of the paper, whatever this model's own activation is.
    """
    return (F.silu(x @ w1.mT) @ w2.mT).mT


def features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All heads' queries, keys and values of a token side by side: [B, heads, T, D] each to [B, T, X], float32."""
    return torch.cat([q.float(), k.float(), v.float()], 1).transpose(1, 2).flatten(2)


def before_rope(view: LayerView) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk's queries [B, Hq, T, D] and keys [B, H, T, D] before RoPE, float32, and its values."""
    tokens = view.chunk.shape[2]
    keys, values, at = (newest(held, tokens) for held in (view.keys(), view.values(), view.positions()))
    return view.rope.unrotate(view.chunk, at[:, :1]), view.rope.unrotate(keys, at), values


def newest(state: Tensor, count: int) -> Tensor:
    """The last ``count`` entries of [B, H, n, …]: a sliding window may have dropped the oldest meanwhile."""
    return state[:, :, state.shape[2] - count :]

"""A forward pass that runs the decoder layers of a transformers causal LM one by one, with our attention and cache.

Between two layers a strategy may let tokens of the prompt stay behind (``view.pass_on``): the layers after it process
fewer tokens. Those keep their original positions, their rotations are computed anew for them alone, and attention stays
causal by position: entries arrive in ascending order, so causal among the entries held is causal by position, and
sliding windows are measured in positions. While all tokens go on, the operations are those of the model's own forward,
on the same chunks, so the logits are equal bit for bit.

A choice between two layers needs the whole prompt to have passed the first of them. So every layer reads the whole
prompt, chunk by chunk, before the next one starts, and the hidden states of all tokens on their way are held: tokens *
hidden_size * bytes of the dtype. For Llama-3-8B in bfloat16 that is 8 KiB a token until the prompt is read, beside the
128 KiB a token of a full cache; the peak counts them. In return only one layer at a time holds the whole prompt
uncompressed.

Axes: T tokens of the prompt, n tokens of a chunk. One sequence at a time.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.cache.cache import Drive, WorkbenchCache
from workbench.errors import ModelError, WorkbenchError
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.models.geometry import Geometry

CHECKED = 4  # tokens on which a model's loop is compared with its own forward
Rotations = dict[str | None, Any]  # by kind of layer (None: the same for all), what its attention rotates with


@dataclass
class Chunk:
    """Some of the prompt's tokens on their way through the layers."""

    hidden: Tensor  # [1, n, hidden_size]
    positions: Tensor  # int64 [1, n], ascending
    rotations: Rotations


class LayerLoop:
    """The decoder loop of a causal LM in its parts: embedding, layers, final norm, head.

    The parts are found by the names that transformers gives them, and a few tokens are compared with the model's own
    forward, so that a model whose loop does something else in between is refused and never run wrongly.

    Raises:
        ModelError: the loop is not of this shape.
    """

    def __init__(self, network: Any, geometry: Geometry) -> None:
        self.network, self.config = network, network.config.get_text_config()
        decoder = network.get_decoder()
        self.embedding, self.head = network.get_input_embeddings(), network.get_output_embeddings()
        self.layers, self.norm = _first(decoder, "layers", "h"), _first(decoder, "norm", "final_layer_norm", "ln_f")
        self.learnt = getattr(decoder, "wpe", None)  # learnt position embeddings (GPT-2)
        self.rotary = getattr(decoder, "rotary_emb", None)
        if any(part is None for part in (self.embedding, self.head, self.layers, self.norm)):
            raise self._refused()
        self.layers = list(self.layers)[: geometry.num_layers]
        self._takes = inspect.signature(type(self.layers[0]).forward).parameters
        self.kinds: list[str | None] = [None] * len(self.layers)
        if self.rotary is not None and "layer_type" in inspect.signature(type(self.rotary).forward).parameters:
            self.kinds = list(self.config.layer_types)  # Gemma 3 rotates its sliding layers by other frequencies
        self._compare(geometry)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token ids [1, n] -> hidden states [1, n, hidden_size] that enter the first layer."""
        hidden = self.embedding(tokens)
        return hidden if self.learnt is None else hidden + self.learnt(positions)

    def chunk(self, hidden: Tensor, positions: Tensor) -> Chunk:
        """Hidden states [1, n, hidden_size] of the tokens at ``positions`` [1, n], ready for a layer."""
        rotations: Rotations = {None: None}
        if self.rotary is not None:
            rotations = {
                kind: self.rotary(hidden, position_ids=positions, **({"layer_type": kind} if kind else {}))
                for kind in dict.fromkeys(self.kinds)  # each once
            }
        return Chunk(hidden, positions, rotations)

    def layer(self, number: int, chunk: Chunk, cache: WorkbenchCache) -> Tensor:
        """Hidden states [1, n, hidden_size] after layer ``number``, which attends through ``cache``."""
        known = {
            "attention_mask": None,
            "position_ids": chunk.positions,
            "past_key_values": cache,
            "layer_past": cache,  # GPT-NeoX's name for it
            "use_cache": True,
            "position_embeddings": chunk.rotations[self.kinds[number]],
        }
        out = self.layers[number](chunk.hidden, **{name: x for name, x in known.items() if name in self._takes})
        return out if isinstance(out, Tensor) else out[0]

    def logits(self, hidden: Tensor, last: int) -> Tensor:
        """[1, last, vocabulary] of the last tokens of ``hidden``, the final norm before it."""
        logits = self.head(self.norm(hidden)[:, -last:])
        cap, scale = getattr(self.config, "final_logit_softcapping", None), getattr(self.network, "logit_scale", None)
        if cap is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits if scale is None else logits * scale  # Cohere

    def _compare(self, geometry: Geometry) -> None:
        """Refuse a model whose own forward gives a few tokens other logits, or whose layers did not use the cache."""
        positions = torch.arange(CHECKED, device=self.embedding.weight.device)[None]
        tokens = positions % geometry.vocab_size
        theirs, ours = (WorkbenchCache(Recipe(), geometry, CHECKED) for _ in range(2))
        with torch.inference_mode():
            expected = self.network(
                input_ids=tokens, position_ids=positions, past_key_values=theirs, use_cache=True
            ).logits
            try:
                chunk = self.chunk(self.embed(tokens, positions), positions)
                for number in range(len(self.layers)):
                    chunk.hidden = self.layer(number, chunk, ours)
                got = self.logits(chunk.hidden, CHECKED)
            except (TypeError, AttributeError, LookupError, ValueError) as error:  # a layer wants something else
                raise self._refused() from error
        used = all(layer.seen == CHECKED for layer in ours.layers)
        same = got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
        if not (used and same):
            raise self._refused()

    def _refused(self) -> ModelError:
        return ModelError(
            f"The layers of a model of type '{self.config.model_type}' cannot be run one by one here, which this recipe "
            "needs; use one that gives every layer every token, for example snapkv(budget=0.25)."
        )


class LayerwisePrefill:
    """A prompt being read layer by layer; :meth:`step` until :attr:`finished`, then :meth:`logits`.

    Args:
        loop: the model's.
        cache: an empty one.
        tokens: ids [1, T].
        chunk: tokens a layer is given at a time.
    """

    def __init__(self, loop: LayerLoop, cache: WorkbenchCache, tokens: Tensor, chunk: int) -> None:
        self.loop, self.cache, self.chunk, self.total = loop, cache, chunk, tokens.shape[1]
        cache.note_prompt(self.total)
        self._layer = self._turn = 0  # the next step: this layer, on this chunk
        positions = torch.arange(self.total, device=tokens.device)[None]
        self._chunks = self._cut(loop.embed(tokens, positions), positions)

    @property
    def finished(self) -> bool:
        return self._layer == len(self.loop.layers)

    @property
    def done(self) -> int:
        """How much is done, in tokens: the share of the layers that are, times T."""
        return int(self.total * (self._layer + self._turn / len(self._chunks)) / len(self.loop.layers))

    def step(self) -> None:
        """Run the next chunk through the current layer; after its last chunk, let stay behind what the layer left."""
        chunk = self._chunks[self._turn]
        entering = sum(one.positions.shape[1] for one in self._chunks)
        waiting = sum(one.hidden.numel() * one.hidden.element_size() for one in self._chunks)
        drive = Drive(entering, waiting, chunk.positions[0] if entering < self.total else None)
        with self.cache.driven(drive):
            chunk.hidden = self.loop.layer(self._layer, chunk, self.cache)
        self._turn += 1
        if self._turn == len(self._chunks):
            self._layer, self._turn = self._layer + 1, 0
            if drive.going_on is not None and len(drive.going_on) < entering:
                self._leave_behind(drive.going_on)

    def logits(self) -> Tensor:
        """Logits [vocabulary] after the prompt's last token."""
        return self.loop.logits(self._chunks[-1].hidden, 1)[0, -1]

    def _leave_behind(self, going_on: Tensor) -> None:
        """Only the tokens at these positions int64 [m] remain."""
        kept = [torch.isin(one.positions[0], going_on) for one in self._chunks]
        hidden = torch.cat([one.hidden[:, rows] for one, rows in zip(self._chunks, kept, strict=True)], 1)
        positions = torch.cat([one.positions[:, rows] for one, rows in zip(self._chunks, kept, strict=True)], 1)
        if not torch.equal(positions[0], going_on) or int(going_on[-1]) != self.total - 1:
            raise WorkbenchError(
                f"A strategy of '{self.cache.recipe.text}' lets tokens go on that are not ascending, not there, or without "
                "the prompt's last one, which the answer comes from; correct what it passes on."
            )
        self._chunks = self._cut(hidden, positions)

    def _cut(self, hidden: Tensor, positions: Tensor) -> list[Chunk]:
        pairs = zip(hidden.split(self.chunk, 1), positions.split(self.chunk, 1), strict=True)
        return [self.loop.chunk(part, at) for part, at in pairs]


def _first(module: Any, *names: str) -> Any:
    """The first attribute of these names that there is, or None."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)

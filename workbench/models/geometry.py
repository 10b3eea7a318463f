"""The shape of a model's attention, read from its config, and how it turns keys by position, read from the model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from workbench.errors import ModelError
from workbench.models.rebuild import Rebuilds
from workbench.models.rope import Ropes

ATTENTION_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Geometry:
    """What a cache needs to know of a model. ``head_dim`` and counts are per layer and the same in every layer."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    element_size: int  # bytes per number
    sliding_windows: tuple[int | None, ...]  # per layer: tokens it sees, None for full attention
    rope_theta: float | None = None
    softcap: float | None = None
    ropes: Ropes = field(default_factory=Ropes, compare=False, repr=False)
    rebuilds: Rebuilds = field(default_factory=Rebuilds, compare=False, repr=False)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes in a full cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.element_size

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for people and machines."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return {**numbers, "bytes_per_token": self.bytes_per_token}

    @classmethod
    def of_network(cls, network: Any) -> Geometry:
        """Read a transformers model; :meth:`of` tells what is refused."""
        parameter = next(network.parameters())
        shape = cls.of(network.config, str(parameter.dtype).removeprefix("torch."), parameter.element_size())
        ropes = Ropes(network)
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
        return replace(shape, ropes=ropes, rebuilds=Rebuilds(network, ropes, shape.num_layers, *heads))

    @classmethod
    def of(cls, config: Any, dtype: str = "float32", element_size: int = 4) -> Geometry:
        """Read a transformers config (a multimodal one by its text part).

        Raises:
            ModelError: the model has no attention cache, or layers of a kind this package cannot hold.
        """
        config = config.get_text_config()
        kind = getattr(config, "model_type", "this")
        heads = getattr(config, "num_attention_heads", None)
        layers = getattr(config, "num_hidden_layers", None)
        if heads is None or layers is None:
            raise ModelError(
                f"A model of type '{kind}' has no attention cache to work on; choose a model with attention layers, "
                "for example house/recall."
            )
        kv_heads = getattr(config, "num_key_value_heads", None)
        kv_heads = heads if kv_heads is None else kv_heads
        positions = getattr(config, "max_position_embeddings", None)
        positions = 1 << 30 if positions is None else positions  # none: the model names no limit
        _check_counts(
            num_attention_heads=heads,
            num_hidden_layers=layers,
            num_key_value_heads=kv_heads,
            hidden_size=getattr(config, "hidden_size", None),
            vocab_size=getattr(config, "vocab_size", None),
            max_position_embeddings=positions,
        )
        if heads % kv_heads:
            raise ModelError(
                f"The config says that {heads} query heads share {kv_heads} KV heads, which does not divide; get the model "
                "again from its source."
            )
        kinds = list(getattr(config, "layer_types", None) or [])
        strange = sorted({k for k in kinds if k not in ATTENTION_LAYERS})
        if strange:
            raise ModelError(
                f"This '{kind}' model has layers of kind {', '.join(strange)}, which hold no plain key-value cache; "
                "choose a model whose layers are full or sliding-window attention."
            )
        window = getattr(config, "sliding_window", None)
        if kinds:
            windows = tuple(window if k == "sliding_attention" else None for k in kinds[:layers])
        else:
            used = window if getattr(config, "use_sliding_window", True) else None
            windows = (used,) * layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        rope = getattr(config, "rope_parameters", None) or {}
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        return cls(
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_positions=positions,
            dtype=dtype,
            element_size=element_size,
            sliding_windows=windows,
            rope_theta=theta,
            softcap=getattr(config, "attn_logit_softcapping", None),
        )


def _check_counts(**counts: Any) -> None:
    """ModelError where a config's number is none, or too small to mean anything."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ModelError(
                f"The config says {name} is {count!r}, which cannot be; get the model again from its source."
            )

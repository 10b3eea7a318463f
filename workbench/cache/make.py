"""``wb.cache``: the drop-in cache for ``model.generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.cache.attention import NAME, register
from workbench.cache.cache import WorkbenchCache
from workbench.errors import ModelError
from workbench.models.artifacts import Artifacts, content_hash
from workbench.models.geometry import Geometry
from workbench.models.load import Model
from workbench.strategies.recipe import Recipe


def cache(recipe: str | Recipe, model: Model | Any, prompt_length: int | None = None) -> WorkbenchCache:
    """A transformers ``Cache`` that follows ``recipe``: ``model.generate(ids, past_key_values=wb.cache(...))``.

    Args:
        recipe: for example ``"snapkv(budget=0.25) | kivi(bits=2)"``.
        model: from :func:`workbench.load`, or a transformers model whose attention implementation is ``workbench``.
        prompt_length: tokens of the prompt, where it is fed in several chunks (``prefill_chunk_size``).

    Raises:
        RecipeError: the recipe cannot be read, cannot run on this model, or needs more than a cache can do.
        ArtifactError: it needs what was not calibrated or trained for this model.
        ModelError: the model uses another attention implementation.
    """
    register()
    parsed = Recipe.parse(recipe)
    if parsed.needs_token_set:
        raise parsed.not_a_drop_in()
    if isinstance(model, Model):
        return WorkbenchCache(parsed, model.geometry, prompt_length, artifacts=model.artifacts)
    used = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if used != NAME:
        raise ModelError(
            f"This model uses the attention implementation '{used}', which would ignore the cache's strategy; call "
            f"model.set_attn_implementation('{NAME}') first."
        )
    geometry = Geometry.of_network(model)
    name = getattr(model.config, "name_or_path", None) or "this model"
    folder = Path(name) if Path(name).is_dir() else None
    artifacts = Artifacts(name, geometry, lambda: content_hash(model, geometry), folder)
    return WorkbenchCache(parsed, geometry, prompt_length, artifacts=artifacts)

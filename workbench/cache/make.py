"""``wb.cache``: the drop-in cache for ``model.generate``."""

from __future__ import annotations

from typing import Any

from workbench.cache.attention import NAME, register
from workbench.cache.cache import WorkbenchCache
from workbench.errors import ModelError
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
        ModelError: the model uses another attention implementation.
    """
    register()
    parsed = Recipe.parse(recipe)
    if parsed.needs_token_set:
        raise parsed.not_a_drop_in()
    if isinstance(model, Model):
        return WorkbenchCache(parsed, model.geometry, prompt_length)
    config = model.config.get_text_config()
    used = getattr(config, "_attn_implementation", None)
    if used != NAME:
        raise ModelError(
            f"This model uses the attention implementation '{used}', which would ignore the cache's strategy; call "
            f"model.set_attn_implementation('{NAME}') first."
        )
    parameter = next(model.parameters())
    geometry = Geometry.of(config, str(parameter.dtype).removeprefix("torch."), parameter.element_size())
    return WorkbenchCache(parsed, geometry, prompt_length)

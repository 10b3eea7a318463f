"""What holds a model's cached keys and values, and how it is handed to transformers.

Called as ``wb.cache(recipe, model)``, it makes a drop-in cache: see :func:`workbench.cache.make.cache`.
"""

from workbench._callable import make_callable

make_callable(__name__, "workbench.cache.make", "cache")

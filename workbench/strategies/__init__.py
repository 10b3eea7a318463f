"""Strategies: one small file per method, found by name, composed by a recipe.

Called as ``wb.strategies()``, it lists them with their parameters.
"""

from workbench._callable import make_callable

make_callable(__name__, "workbench.strategies.registry", "strategies")

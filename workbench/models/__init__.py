"""Loading models and reading their geometry. Called as ``wb.models()``, it lists the shipped models."""

from workbench._callable import make_callable

make_callable(__name__, "workbench.models.house", "models")

"""``kvw models`` and ``kvw strategies``."""

from __future__ import annotations

from rich.table import Table

from workbench.commands.output import STDOUT, check_target, console, write_result


def list_models(json_file: str | None) -> None:
    """Print the models that need no network."""
    from workbench.models.house import models

    check_target(json_file)
    found = models()
    if json_file is not None:
        write_result(json_file, found)
        return
    out = console()
    if not found:
        out.print("No house model is installed; a local folder or a Hub id loads by name.", markup=False)
        return
    table = Table("name", "what it is")
    for model in found:
        table.add_row(model["name"], model["title"])
    out.print(table)
    out.print("Any causal language model in a local folder or on the Hub loads by name as well.", markup=False)


def list_strategies(as_json: bool) -> None:
    """Print every strategy with its parameters and defaults."""
    from workbench.strategies.base import written
    from workbench.strategies.registry import strategies

    found = strategies()
    if as_json:
        write_result(STDOUT, found)
        return
    table = Table("strategy", "family", "what it does", "parameters", show_lines=True)
    for one in found:
        given = [f"{name}={written(p['default'])}" for name, p in one["parameters"].items()]
        table.add_row(one["name"], one["family"], f"{one['summary']}\n{one['paper']}".strip(), "\n".join(given))
    out = console()
    out.print(table)
    out.print(
        'Compose them with a bar: --lane "snapkv(budget=0.25) | kivi(bits=2)"; full keeps everything.', markup=False
    )

"""``kvw inspect``: what every head of a model attends to in a prompt, as JSON or a table."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from workbench.commands.compare import interruptible
from workbench.commands.output import check_target, console, size, stderr, write_result
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.inspection.trace import AttentionTrace

SHOWN = 5  # tokens named in a line


def run(
    model: str,
    prompt: str | list[int],
    layers: list[int] | None,
    options: dict[str, Any],
    top: int,
    device: str,
    dtype: str,
    json_file: str | None,
) -> int:
    """Inspect; 0, or 1 where it was interrupted."""
    from workbench.models.load import load
    from workbench.runs.control import Control
    from workbench.runs.inspect import inspecting
    from workbench.runs.prompt import Cancelled

    check_target(json_file)
    if top < 1:
        raise WorkbenchError(f"--top must be at least 1 token, got {top}.")
    loaded = load(model, device, dtype)
    ids = loaded.encode(prompt)
    control = Control()
    work = inspecting(loaded, ids, layers=layers, control=control, **options)
    out = stderr()
    columns = (
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,}"),
        TimeElapsedColumn(),
    )
    with (
        interruptible(control),
        Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress,
    ):
        bar = progress.add_task("reading", total=len(ids))
        while True:
            try:
                progress.update(bar, completed=next(work))
            except StopIteration as finished:
                trace: AttentionTrace = finished.value
                break
            except Cancelled:
                print("Interrupted before the prompt was read; nothing was measured.", file=sys.stderr)
                return 1
    if json_file is None:
        show(trace)
    else:
        write_result(json_file, trace.as_dict(top))
    return 0


def show(trace: AttentionTrace) -> None:
    """A line for each layer and head, and what the last token reads most."""
    out = console()
    out.print(repr(trace), markup=False)
    table = Table(
        "head", "entropy (nats)", "on first tokens", "on itself", "within 8 tokens", "read most, over the prompt"
    )
    for column in table.columns[1:5]:
        column.justify = "right"
    entropy, sinks, distance = trace.entropy(), trace.sink_mass(), trace.distance_mass()
    for number, layer in enumerate(trace.layers):
        mass = trace.column_mass(layer) / len(trace.prompt)
        for head in range(mass.shape[0]):
            strongest = mass[head].topk(min(SHOWN, mass.shape[1]))
            named = "  ".join(
                f"{at}:{share:.2f}"
                for at, share in zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)
            )
            table.add_row(
                f"L{layer} H{head}",
                f"{entropy[number, head]:.2f}",
                f"{sinks[number, head]:.1%}",
                f"{distance[number, head, 0]:.1%}",
                f"{distance[number, head, :4].sum():.1%}",
                named,
            )
    out.print(table)
    uniform = math.log(len(trace.prompt))
    held = trace.nbytes()
    out.print(
        f"Entropy of even attention to all tokens: {uniform:.2f} nats. All queries and heads counted, none sampled. "
        f"Counts {size(held['counts'])}, queries {size(held['queries'])}, cache {size(held['cache'])}.",
        markup=False,
    )

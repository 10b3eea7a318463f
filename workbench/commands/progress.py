"""A bar on stderr where that is a terminal, else a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from workbench.commands.output import stderr

BETWEEN_LINES = 60.0  # seconds


@contextmanager
def bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """Within, the function given tells the share done (0 to 1) and where the work stands."""
    screen = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    last = time.monotonic()
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as progress:
        task = progress.add_task(title, total=1.0, state="starting")

        def tell(done: float, state: str) -> None:
            nonlocal last
            progress.update(task, completed=done, state=state)
            if not screen.is_terminal and (time.monotonic() - last > BETWEEN_LINES or done >= 1):
                last = time.monotonic()
                print(f"{title}: {state}", file=sys.stderr, flush=True)

        yield tell


def to_go(seconds: float) -> str:
    """Seconds still to come, for people."""
    if seconds == float("inf"):
        return "…"
    return f"{seconds / 60:.0f} min to go" if seconds >= 90 else f"{seconds:.0f} s to go"

"""Where the commands write: JSON to a file or standard output, tables to standard output, the rest to stderr."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from workbench.errors import StorageError
from workbench.runs.save import check_writable, to_json, write_json

STDOUT = "-"


def console() -> Console:
    """Standard output; wide enough for a table when it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def check_target(json_file: str | None) -> None:
    """Refuse a place that cannot be written to before anything is computed."""
    if json_file not in (None, STDOUT):
        check_writable(str(json_file))


def write_result(json_file: str, data: Any) -> None:
    """Write JSON to the file, or to standard output for ``-``.

    Raises:
        StorageError: the file could not be written; the result is then on standard output, so it is not lost.
    """
    if json_file == STDOUT:
        _to_stdout(data)
        return
    try:
        write_json(json_file, data)
    except StorageError as error:
        _to_stdout(data)
        raise StorageError(f"{str(error).rstrip('.')}. The results are on standard output instead.") from None
    print(f"Results are in {json_file}.", file=sys.stderr)


def _to_stdout(data: Any) -> None:
    try:
        sys.stdout.write(to_json(data))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(
            f"Standard output cannot be written to ({error.strerror or error}); give --json a file."
        ) from None


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

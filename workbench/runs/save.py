"""Writing results so that a crash, a full disk or a closed pipe never leaves half a file."""

from __future__ import annotations

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from workbench.errors import StorageError


def to_json(data: Any) -> str:
    """``data`` as JSON text; NaN and infinity, which JSON does not know, become null."""
    return json.dumps(_finite(data), ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, data: Any) -> Path:
    """Write ``data`` to ``path``: the file is there whole, or as it was before.

    Returns:
        The path written to.

    Raises:
        StorageError: the disk is full, or the place cannot be written to.
    """
    return write_text(path, to_json(data))


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text as :func:`write_bytes` does."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write beside the target, force it to the disk, then take the target's place in one move."""
    target = check_writable(path)
    special = target.exists() and not target.is_file()  # a pipe or a device is written to, not replaced
    fresh = target if special else target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(fresh, "wb") as file:
            file.write(data)
            file.flush()
            if not special:
                os.fsync(file.fileno())
        if not special:
            os.replace(fresh, target)
    except OSError as error:
        raise _storage_error(path, error) from None
    finally:
        if not special:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
    return target


def check_writable(path: str | Path) -> Path:
    """The resolved target, links followed; StorageError where nothing could be written, before anything is computed."""
    try:
        target = Path(path).expanduser().resolve()
        if target.is_dir():
            raise StorageError(f"{path} is a folder; give the name of a file in it.")
        if not target.parent.is_dir():
            raise StorageError(f"{path} cannot be written, because its folder does not exist; make the folder first.")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise _storage_error(path, PermissionError(errno.EACCES, "permission denied"))
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, no such user
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"{Path(path).name[:40]!r} cannot be used as a file name ({reason}); choose another."
        ) from None
    return target


def _storage_error(path: str | Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path} was not saved, because the disk is full; free some space or save it elsewhere.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path} was not saved, because this place may not be written to; save it elsewhere.")
    return StorageError(f"{path} was not saved ({error.strerror or error}); save it elsewhere.")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data

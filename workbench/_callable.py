"""Packages that can be called: ``wb.cache(...)``, ``wb.models()`` and ``wb.strategies()`` share names with folders.

Importing ``workbench.cache.store`` binds the package ``workbench.cache`` on ``workbench``, over any function of that
name. So the package itself takes the call and passes it to its function, which loads on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, where: str, function: str) -> None:
    """Let ``package`` be called as ``where.function``."""

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(where), function)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage

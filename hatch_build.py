"""Put the app into the wheel as `workbench/_apps`, so that `kvw app` works where there is no checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AppsInWheel(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        apps = Path(self.root, "apps")
        if version == "standard" and apps.is_dir():  # an editable install reads apps/ where it lies
            build_data["force_include"][str(apps)] = "workbench/_apps"

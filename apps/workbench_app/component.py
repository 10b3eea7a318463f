"""What the app's own browser parts have in common with the components of `workbench_widgets`: their form."""

from __future__ import annotations

from typing import Any

import panel as pn


class Component(pn.custom.AnyWidgetComponent):
    """An ES module of `render({model, el})` that returns its clean-up. Never a `JSComponent`: Panel 1.9 keeps one
    render function for both kinds on a page, and whichever comes second is called wrongly."""

    _esm = "export default { render() { return () => {}; } };"

    @classmethod
    def _process_importmap(cls) -> dict[str, Any]:
        return {}  # Panel's names React's web address; nothing is imported

"""Components of KV Workbench, for Jupyter (anywidget); `workbench_widgets.panel` has the same for Panel."""

from workbench_widgets.head_matrix import HeadMatrix
from workbench_widgets.token_strip import TokenStatus, TokenStrip

__all__ = ["HeadMatrix", "TokenStatus", "TokenStrip"]

"""What the views look at: the lane, head and token that were picked, or those that tell most until somebody picks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from workbench_app.ask import LaneState
    from workbench_app.session import Session
    from workbench_app.state import UIState


def lane_on_show(session: Session, state: UIState) -> LaneState | None:
    lane = session.lane(state.lane) if state.lane is not None else None
    return lane or session.reference


def head_on_show(lane: LaneState, state: UIState) -> tuple[int, int] | None:
    """(layer, KV head): the one that was picked, or that lost most, or one in the middle. None before there are any."""
    if not lane.kept:
        return None
    layer, head = state.layer, state.head
    if layer is None or head is None:
        lost = np.asarray(lane.why.lost_mass if lane.why is not None else [])
        if lost.size and lost.max() > 0:
            layer, head = (int(i) for i in np.unravel_index(int(lost.argmax()), lost.shape))
        else:
            layer, head = len(lane.kept) // 2, 0
    return min(layer, len(lane.kept) - 1), min(head, len(lane.kept[0]) - 1)


def token_on_show(session: Session, lane: LaneState, state: UIState) -> int | None:
    """The prompt token that was picked, or whose loss broke the lane, or that holds the answer, or the last one."""
    total = len(session.texts)
    if state.key is not None and state.key < total:
        return state.key
    if lane.why is not None and lane.why.lost:
        return lane.why.lost[0].position
    evidence = [position for position in session.evidence if position < total]
    return evidence[0] if evidence else total - 1 if total else None

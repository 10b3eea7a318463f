"""Small typed events: what a run says while it runs. The app, widgets, CLI and tests all consume these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from workbench.cache.cache import Memory
    from workbench.runs.lane import Lane
    from workbench.runs.steer import Edit


@dataclass(frozen=True)
class Event:
    """Something that happened in lane number ``lane``."""

    lane: int


@dataclass(frozen=True)
class Queued(Event):
    """The lane waits for the device; ``ahead`` runs come first."""

    ahead: int


@dataclass(frozen=True)
class PrefillProgress(Event):
    """``done`` of ``total`` prompt tokens were read."""

    done: int
    total: int


@dataclass(frozen=True)
class CacheState(Event):
    """What the cache holds right after the prompt, after something was done to it by hand, or after the last token."""

    moment: Literal["prompt", "edit", "end"]
    memory: Memory
    kept: list[list[list[int]]]  # positions per KV head per layer
    packed: list[list[int]]  # per layer and KV head: how many of the first kept entries are held as codes
    restored: list[list[list[int]]] = field(default_factory=list)  # kept entries put back by hand: none of the former


@dataclass(frozen=True)
class Token(Event):
    """Token number ``index`` was generated, ``seconds`` after the lane's decoding began."""

    index: int
    token: int
    text: str
    seconds: float


@dataclass(frozen=True)
class Paused(Event):
    """The lane is held before its token number ``index``; the device is free for others meanwhile."""

    index: int


@dataclass(frozen=True)
class Edited(Event):
    """``edit`` was done before token ``edit.token`` was chosen; what is held now follows as a :class:`CacheState`."""

    edit: Edit


@dataclass(frozen=True)
class Refused(Event):
    """Something asked for while the lane ran cannot be done; the lane goes on as it was."""

    sentence: str


@dataclass(frozen=True)
class Probe(Event):
    """A measurement: ``drift`` or ``kl`` (teacher-forced, nats per reference token)."""

    name: Literal["drift", "kl"]
    data: Any


@dataclass(frozen=True)
class LaneDone(Event):
    """The lane is finished, cancelled or failed (``result.stopped``); ``result`` has everything."""

    result: Lane


AnyEvent = Queued | PrefillProgress | CacheState | Token | Paused | Edited | Refused | Probe | LaneDone

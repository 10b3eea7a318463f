"""What one layer and KV head did with every token of the prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import traitlets as t

from workbench_widgets.base import Component, Publisher, as_array, module_text


class TokenStatus(IntEnum):
    """What became of one token in one head's cache."""

    EVICTED = 0
    KEPT = 1
    QUANTIZED = 2
    MERGED = 3
    RECOMPUTED = 4
    PENDING = 5


# How a status is drawn, and whether the head still holds something of the token (1, 0, None: not known yet).
LOOKS: dict[TokenStatus, tuple[str, int | None]] = {
    TokenStatus.KEPT: ("filled", 1),
    TokenStatus.EVICTED: ("hatched", 0),
    TokenStatus.QUANTIZED: ("dotted", 1),
    TokenStatus.MERGED: ("bracket", 1),
    TokenStatus.RECOMPUTED: ("double", 1),
    TokenStatus.PENDING: ("dashed", None),
}
LEGEND = json.dumps(
    [{"code": s.value, "name": s.name.lower(), "look": look, "held": held} for s, (look, held) in LOOKS.items()]
)


def token_text(token: str | bytes) -> str:
    """A token as text without NUL, which separates tokens on the way; bytes that are no UTF-8 become ⟨0xE2⟩."""
    if isinstance(token, bytes):
        # undecodable bytes come out as lone surrogates U+DC80…U+DCFF, which have no UTF-8 and are never sent
        text = token.decode("utf-8", "surrogateescape")
        token = "".join(f"⟨0x{ord(c) - 0xDC00:02X}⟩" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
    return token.replace("\0", "⟨0x00⟩").encode("utf-8", "replace").decode("utf-8")


class ShowsTokens(Publisher):
    """`show` of the token strip, for both hosts."""

    def show(
        self,
        tokens: Sequence[str | bytes],
        status: Any,
        score: Any = None,
        share: Any = None,
        positions: Any = None,
        marks: Sequence[int] = (),
        title: str = "",
    ) -> None:
        """Draw what became of T tokens.

        tokens: T texts in the prompt's order, or raw bytes where a token is only part of a character.
        status: [T] codes of `TokenStatus`.
        score: [T] the scorer's value per token, NaN where it gave none.
        share: [T] fraction of all heads that keep the token, 0 to 1, for the strip over the whole prompt.
        positions: [T] the position each token's key is rotated to, if that is not its place in the prompt.
        marks: tokens to mark, such as the evidence for an answer.
        title: for instance "Lane B · L3 KV1 · 64 of 256 kept".
        """
        T = len(tokens)
        codes = as_array(status, "<i8")
        extra = {
            name: as_array([] if given is None else given, dtype)
            for name, given, dtype in (
                ("score", score, "<f4"),
                ("share", share, "<f4"),
                ("positions", positions, "<i4"),
            )
        }
        if codes.shape != (T,):
            raise ValueError(f"status takes one code per token: {T} tokens, got shape {codes.shape}")
        for name, values in extra.items():
            if values.shape != (T,) and values.shape != (0,):
                raise ValueError(f"{name} takes one value per token: {T} tokens, got shape {values.shape}")
        if unknown := sorted(set(np.unique(codes).tolist()) - set(TokenStatus)):
            names = ", ".join(f"{s.value} {s.name.lower()}" for s in TokenStatus)
            raise ValueError(f"unknown status codes {unknown}; known are {names}")
        if np.any((extra["share"] < 0) | (extra["share"] > 1)):
            raise ValueError("share is a fraction of the heads, 0 to 1; got values outside")
        if outside := [int(m) for m in marks if not 0 <= m < T]:
            raise ValueError(f"marks are token numbers from 0 to {T - 1}, got {outside}")
        self._publish(
            tokens="\0".join(map(token_text, tokens)),
            status=codes.astype(np.uint8).tobytes(),
            **{name: values.tobytes() for name, values in extra.items()},
            marks=sorted(int(m) for m in marks),
            title=title,
        )


class TokenStrip(ShowsTokens, Component):
    """Every prompt token and what became of it, in Jupyter. A click or Enter sets `selected` to {"n", "token"}."""

    _esm = module_text(Path(__file__).with_name("index.js"))

    tokens = t.Unicode("", help="T texts joined by NUL").tag(sync=True)
    status = t.Bytes(b"", help="uint8 [T], codes of TokenStatus").tag(sync=True)
    score = t.Bytes(b"", help="float32 [T], or empty").tag(sync=True)
    share = t.Bytes(b"", help="float32 [T] fraction of all heads, or empty").tag(sync=True)
    positions = t.Bytes(b"", help="int32 [T], or empty").tag(sync=True)
    marks = t.List(t.Int(), [], help="marked tokens, ascending").tag(sync=True)
    title = t.Unicode("").tag(sync=True)
    tint = t.Unicode("", help="CSS colour of what is kept, such as the lane's; empty: the host's accent").tag(sync=True)
    legend = t.Unicode(LEGEND, help="JSON: code, name, look and held of every status").tag(sync=True)
    picked = t.Int(-1, help="the token that is outlined, or -1").tag(sync=True)
    reveal = t.Int(0, help="counts up to bring the strip into sight and put the keyboard on it").tag(sync=True)
    hint = t.Unicode("No tokens yet: run a lane to see what it keeps.").tag(sync=True)

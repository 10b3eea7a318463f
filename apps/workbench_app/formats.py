"""Numbers, tokens and lanes as people read them."""

from __future__ import annotations

from dataclasses import dataclass

ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")  # tokens that end an answer, as texts
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_text(size: float) -> str:
    """A number of bytes in the unit that fits: `91.5 KiB`."""
    step = 0
    while abs(size) >= 1024 and step < len(UNITS) - 1:
        size, step = size / 1024, step + 1
    digits = 0 if step == 0 or abs(size) >= 100 else 1
    return f"{size:,.{digits}f} {UNITS[step]}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share as `26 %`; one below half a percent keeps a digit, so that little is not called nothing."""
    if share is None:
        return "–"
    if 0 < share < 0.005:
        return "< 0.5 %"
    return f"{100 * share:.{digits}f} %"


def seconds_text(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def nats(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value >= 0.001 else f"{value:.0e}"


def count(number: int, what: str) -> str:
    """`1 token`, `64 tokens`, `1,024 tokens`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def visible(text: str) -> str:
    """A token's text with its spaces and line ends shown."""
    shown = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return shown or "∅"


def quoted(text: str, most: int = 60) -> str:
    """A piece of output in a sentence: one line, cut in the middle of nowhere only when long."""
    line = " ".join(text.split())
    line = line if len(line) <= most else line[: most - 1].rstrip() + "…"
    return f"“{line}”" if line else "nothing"


@dataclass(frozen=True)
class Look:
    """How a lane is told from the others: letter, colour, dash pattern, marker. Colour is never the only sign."""

    letter: str
    colour: str
    dash: str  # Bokeh's dash patterns
    marker: str  # Bokeh's markers

    @property
    def name(self) -> str:
        return "The reference" if self.letter == "Ref" else f"Lane {self.letter}"


REFERENCE = Look("Ref", "#8A8D8C", "solid", "circle")
LANES = (
    Look("A", "#3498D1", "dashed", "square"),
    Look("B", "#E77116", "dotted", "triangle"),
    Look("C", "#C000FF", "dashdot", "diamond"),
    Look("D", "#82592F", "dotdash", "inverted_triangle"),
)


def look(place: int) -> Look:
    """The look of the lane at a place; beyond five lanes there are letters, but no new hues."""
    if place == 0:
        return REFERENCE
    if place <= len(LANES):
        return LANES[place - 1]
    letter = chr(ord("A") + place - 1) if place <= 26 else f"L{place}"
    return Look(letter, REFERENCE.colour, "dotted", "cross")

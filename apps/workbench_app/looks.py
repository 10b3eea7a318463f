"""Style sheets of the page and the theme of its controls. Colours follow the page's light or dark theme."""

from __future__ import annotations

from typing import Any

PRIMARY, PRIMARY_DARK = "#0b5d8a", "#7cc3ec"

_TYPE: dict[str, Any] = {
    "fontSize": 13,
    "button": {"textTransform": "none", "fontWeight": 500, "letterSpacing": 0},
}


def _parts(dark: bool) -> dict[str, Any]:
    line = "rgba(255,255,255,.16)" if dark else "rgba(0,0,0,.13)"
    ground, ink = ("#121212", "#f2f2f2") if dark else ("#ffffff", "#1a1a1a")
    bar = {"backgroundColor": ground, "backgroundImage": "none", "color": ink, "boxShadow": "none"}
    return {
        "MuiAppBar": {"styleOverrides": {"root": {**bar, "borderBottom": f"1px solid {line}"}}},
        "MuiDrawer": {"styleOverrides": {"paper": {"backgroundColor": ground, "backgroundImage": "none"}}},
        "MuiButton": {"defaultProps": {"disableElevation": True}},
        "MuiToolbar": {"styleOverrides": {"root": {"minHeight": "52px !important"}}},
        "MuiInputBase": {"styleOverrides": {"root": {"fontSize": 13}}},
        "MuiButtonBase": {"defaultProps": {"disableRipple": True}},
    }


THEME: dict[str, Any] = {
    mode: {
        "palette": {
            "primary": {"main": PRIMARY_DARK if mode == "dark" else PRIMARY},
            "background": {"default": ground, "paper": ground},
            "text": {"primary": ink},
        },
        "typography": _TYPE,
        "shape": {"borderRadius": 5},
        "components": _parts(mode == "dark"),
    }
    for mode, ground, ink in (("light", "#ffffff", "#1a1a1a"), ("dark", "#121212", "#f2f2f2"))
}

TOKENS = """
:host {
  --ink: var(--panel-on-background-color, #1a1a1a);
  --ground: var(--panel-background-color, #fff);
  --quiet: color-mix(in srgb, var(--ink) 66%, var(--ground));
  --line: color-mix(in srgb, var(--ink) 14%, transparent);
  --wash: color-mix(in srgb, var(--ink) 4%, transparent);
  --mono: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  color: var(--ink);
  font-variant-numeric: tabular-nums;
}
"""
PAGE = "#loader { background: transparent !important; pointer-events: none; }"  # the page is drawn while it loads
MAIN = (
    TOKENS
    + ":host { padding: 14px 20px 28px; box-sizing: border-box; max-width: 100%; flex: none !important; height: auto !important; max-height: none !important; }"
)
MAIN += "@media (max-width: 600px) { :host { padding: 10px 12px 24px; } }"
LANES = (
    TOKENS
    + """
:host { display: grid !important; flex: none !important; max-height: none !important; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); align-items: stretch; }
@media (max-width: 700px) {
  :host { grid-template-columns: none; grid-auto-flow: column; grid-auto-columns: 92%; overflow-x: auto; scroll-snap-type: x mandatory; padding-bottom: 6px; align-items: start; }
}
"""
)
CARD = (
    TOKENS
    + """
@media (min-width: 701px) { :host { align-self: stretch !important; } }
@media (max-width: 700px) { :host { align-self: start !important; } }
:host { border: 1px solid var(--line); border-radius: 8px; padding: 13px 14px 10px; box-sizing: border-box; min-width: 0; height: auto !important; max-height: none !important; scroll-snap-align: start; }
"""
)
FORM = (
    TOKENS
    + ":host { flex: none !important; margin-top: 10px !important; padding-top: 6px; border-top: 1px solid var(--line); }"
)
FORM_ROW = ":host { align-items: center; flex-wrap: nowrap; gap: 0; }"
BAR = ":host { align-items: end; gap: 6px 14px; flex-wrap: wrap; }"
HEADER = (
    ":host { align-items: center; gap: 10px; flex-wrap: nowrap; } @media (max-width: 480px) { :host { gap: 6px; } }"
)
DRAWER = TOKENS + ":host { padding: 4px 16px 24px; box-sizing: border-box; }"
PAIRS = ":host { display: grid !important; grid-template-columns: 1fr 1fr; gap: 10px; align-items: center; }"
SECTION = TOKENS + ":host { margin-top: 26px !important; flex: none !important; max-height: none !important; }"
HEADS = """
:host { display: grid !important; gap: 18px; grid-template-columns: minmax(250px, 5fr) minmax(0, 11fr); align-items: start; }
@media (max-width: 1000px) { :host { grid-template-columns: minmax(0, 1fr); } }
"""
TEXT = (
    TOKENS
    + """
h1, h2, h3, p, ul { margin: 0; }
h1 { line-height: 32px; font-size: 17px; font-weight: 650; letter-spacing: -0.1px; white-space: nowrap; }
@media (max-width: 480px) { h1 { font-size: 14.5px; } .lead { font-size: 15.5px; } .roomy { display: none; } }
h2 { font-size: 15px; font-weight: 650; }
h2 small { font-weight: 400; color: var(--quiet); font-size: 13px; margin-left: 8px; }
p { line-height: 1.5; }
.quiet { color: var(--quiet); }
.lead { font-size: 17px; line-height: 1.45; font-weight: 450; max-width: 110ch; text-wrap: pretty; }
.lead + .lead { margin-top: 3px; }
.why { margin-top: 5px; font-size: 13.5px; color: var(--quiet); }
.lead b { font-weight: 650; }
.lead .n { white-space: nowrap; }
.status { font-size: 13px; line-height: 32px; white-space: nowrap; }
.trouble { padding: 8px 11px; border-radius: 5px; border: 1px solid color-mix(in srgb, var(--danger-bg-color, #c62828) 55%, transparent);
  background: color-mix(in srgb, var(--danger-bg-color, #c62828) 9%, var(--ground)); font-size: 13px; overflow-wrap: anywhere; }
code, .mono { font-family: var(--mono); font-size: 12.5px; }
.chip { display: inline-block; padding: 0 6px; border: 1px solid var(--line); border-radius: 4px; font: 12.5px/1.5 var(--mono); white-space: pre; }
pre { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 6px; background: var(--wash); overflow: auto; font: 12.5px/1.55 var(--mono); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; list-style: none; font-size: 12.5px; color: var(--quiet); }
.legend li { display: inline-flex; align-items: center; gap: 6px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 12px; margin: 0; font-size: 12.5px; }
dt { color: var(--quiet); } dd { margin: 0; }
.waiting { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); margin-top: 66px; }
.waiting div { height: 430px; border: 1px solid var(--line); border-radius: 8px; background: linear-gradient(var(--wash), transparent); }
details { font-size: 12.5px; margin-top: 2px; } summary { cursor: pointer; color: var(--quiet); width: fit-content; }
summary:focus-visible { outline: 2px solid var(--panel-primary-color, #1976d2); outline-offset: 2px; }
.scroll { max-height: 260px; overflow: auto; margin-top: 6px; }
.grid { border-collapse: separate; border-spacing: 2px; margin-bottom: 14px; } .grid caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
.grid caption span, .grid th span { font-weight: 400; } .grid th { padding: 3px 8px 3px 0; } .grid td { padding: 4px 9px; text-align: center; border-radius: 3px; min-width: 34px; background: color-mix(in srgb, var(--ink) var(--much), transparent); }
.grid tbody th { text-align: left; max-width: 170px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
table { font-size: 12.5px; } table:not(.grid) { border-collapse: collapse; } table:not(.grid) :is(th, td) { padding: 2px 10px 2px 0; text-align: right; } th { font-weight: 600; }
"""
)

"""What only the browser can do or know: keys that work anywhere on the page, the clipboard, how wide the window is."""

from __future__ import annotations

from typing import Any

import param

from workbench_app.component import Component

NARROW = 960  # CSS pixels; below it the drawer waits behind its button


class Keys(Component):
    """Esc stops, Ctrl+Enter runs, Ctrl+Z undoes, Shift+Ctrl+Z does again. What a person types in a field stays there."""

    pressed = param.Dict({}, doc='{"n": …, "key": "Escape" | "undo" | "redo" | "run"}')
    copied = param.Dict({}, doc='text for the clipboard: {"n": …, "text": …}')
    window = param.Dict({}, doc='{"narrow": bool}, as soon as it is known and when it changes')
    drawn = param.Boolean(False, doc="the page's controls are all on the screen")
    limit = param.Integer(NARROW, doc="the width below which a window is narrow")

    def copy(self, text: str) -> None:
        """Put text on the clipboard."""
        n: Any = self.copied.get("n", 0)
        self.copied = {"n": n + 1, "text": text}

    _esm = """
function render({ model }) {
  let n = 0;
  const tell = (name, value) => { model.set(name, value); model.save_changes(); };
  const field = (node) => node.isContentEditable || node.tagName === "TEXTAREA"
    || (node.tagName === "INPUT" && !["range", "checkbox", "radio", "button"].includes(node.type));
  const named = (event) => {
    const ctrl = event.ctrlKey || event.metaKey;
    if (event.key === "Escape") return "Escape";
    if (ctrl && event.key === "Enter") return "run";
    if (!ctrl || event.key.toLowerCase() !== "z" || event.composedPath().some(field)) return null;
    return event.shiftKey ? "redo" : "undo";
  };
  const hear = (event) => {
    const target = event.composedPath()[0];
    // a number field of panel-material-ui takes Enter once and then, while it keeps the focus, nothing more
    if (event.key === "Enter" && target.tagName === "INPUT" && field(target)) target.blur();
    const key = event.defaultPrevented ? null : named(event);
    if (!key) return;
    if (key !== "Escape") event.preventDefault();
    tell("pressed", { n: ++n + Date.now(), key });
  };
  const copy = () => { navigator.clipboard?.writeText(model.get("copied").text ?? "").catch(() => {}); };
  const query = window.matchMedia(`(max-width: ${model.get("limit")}px)`);
  const measure = () => tell("window", { narrow: query.matches });
  window.addEventListener("keydown", hear);
  query.addEventListener("change", measure);
  model.on("change:copied", copy);
  measure();

  // A control of panel-material-ui misses what it is told between its first drawing and its mounting. So Python hears
  // when no more controls come: their number has not changed for a while in which the browser had time.
  const controls = (root, seen = [0, 0]) => {
    for (const node of root.querySelectorAll("*")) {
      if (!node.shadowRoot) continue;
      if (/ReactComponent/.test(node.className)) {
        seen[0]++;
        if ([...node.shadowRoot.children].some((child) => child.childElementCount)) seen[1]++;
      }
      controls(node.shadowRoot, seen);
    }
    return seen;
  };
  let [before, calm] = ["", 0];
  const watch = window.setInterval(() => {
    const now = String(controls(document));
    calm = now === before ? calm + 1 : 0;
    before = now;
    if (calm < 4) return;
    window.clearInterval(watch);
    tell("drawn", true);
  }, 60);
  return () => {
    window.clearInterval(watch);
    window.removeEventListener("keydown", hear);
    query.removeEventListener("change", measure);
    model.off("change:copied", copy);
  };
}
export default { render };
"""

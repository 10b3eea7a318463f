// One lane as a person reads it: head, state, output with its differences marked, and what its cache holds.
// Python decides what is shown (`shown`) and hears what was chosen (`chosen`).

const make = (tag, name, parent, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
};
const set = (node, name, value) => {
  if (value === null || value === undefined) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
};

const ICONS = {                                                    // drawn on a grid of 16
  left: "M10 3 5 8l5 5", right: "m6 3 5 5-5 5", remove: "m4 4 8 8m0-8-8 8",
  duplicate: "M6 6h7v7H6zM3.5 10H3V3h7v.5",
};
const icon = (name) => `<svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="1.5"><path d="${ICONS[name]}"/></svg>`;

/** Height in % of the bar under a token: 0.0001 nats and less is nothing, 10 nats and more is all. */
export const barHeight = (kl) => (kl > 1e-4 ? Math.min(100, 20 * (Math.log10(kl) + 4)) : 0);

function render({ model, el }) {
  const root = make("section", "lane", el);
  const head = make("header", "head", root);
  const badge = make("span", "badge", head);
  const title = make("h3", "title", head);
  const actions = make("div", "actions", head);
  const recipe = make("code", "recipe", root);
  const marks = make("ul", "marks", root);
  const state = make("div", "state", root);
  const dot = make("span", "dot", state);
  const said = make("span", "said", state);
  const rail = make("div", "rail", root);
  const bar = make("div", "bar", rail);
  const trouble = make("div", "trouble", root);
  const output = make("div", "output", root);
  const steering = make("div", "steering", root);
  const facts = make("div", "facts", root);
  const meter = make("div", "meter", root);
  set(dot, "aria-hidden", "true");
  set(said, "role", "status");
  set(trouble, "role", "alert");
  set(output, "role", "listbox");
  output.tabIndex = 0;

  let n = 0;
  let cursor = -1;
  let tokens = [];
  const choose = (what) => { model.set("chosen", { n: ++n + Date.now(), ...what }); model.save_changes(); };

  const buttons = [["left", "Move left"], ["right", "Move right"], ["duplicate", "Duplicate"], ["remove", "Remove"]];
  for (const [name, words] of buttons) {
    const button = make("button", "action", actions);
    button.innerHTML = icon(name);
    button.type = "button";
    button.dataset.action = name;
    button.dataset.words = words;
    button.addEventListener("click", () => choose({ action: name }));
  }

  const point = (index) => {
    if (!tokens.length) return;
    cursor = Math.max(0, Math.min(tokens.length - 1, index));
    [...output.children].forEach((node, i) => node.classList.toggle("cursor", i === cursor));
    set(output, "aria-activedescendant", output.children[cursor].id);
    output.children[cursor].scrollIntoView({ block: "nearest" });
  };
  output.addEventListener("click", (event) => {
    const node = event.composedPath().find((part) => part.dataset?.token !== undefined);
    if (node) { point(Number(node.dataset.token)); choose({ token: cursor }); }
  });
  output.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8, Home: -1e6, End: 1e6 }[event.key];
    if (step) point(cursor < 0 ? 0 : cursor + step);
    else if (event.key === "Enter" && cursor >= 0) choose({ token: cursor });
    else if (event.key.toLowerCase() === "f" && cursor >= 0 && !(event.ctrlKey || event.metaKey || event.altKey)) {
      choose({ action: "fork", token: cursor });
    }
    else return;
    event.preventDefault();
  });
  output.addEventListener("blur", () => [...output.children].forEach((node) => node.classList.remove("cursor")));

  const paintTokens = (shown) => {
    tokens = shown.tokens;
    while (output.children.length > tokens.length) output.lastChild.remove();
    tokens.forEach(([text, mark, kl, words], i) => {
      let node = output.children[i];
      if (!node) {
        node = make("span", "token", output);
        node.id = `t${i}`;
        node.dataset.token = i;
        set(node, "role", "option");
        make("span", "text", node);
        make("span", "kl", node);
      }
      if (node.firstChild.textContent !== text) node.firstChild.textContent = text;
      node.className = `token ${mark}${i === shown.picked ? " picked" : ""}${i === cursor ? " cursor" : ""}`;
      const height = kl === null ? 0 : barHeight(kl);
      node.lastChild.style.height = `${0.08 * height}px`;
      if (node.title !== words) node.title = words;
      set(node, "aria-label", words);
      set(node, "aria-selected", i === shown.picked);
    });
    output.classList.toggle("stale", shown.stale);
    output.classList.toggle("empty", !tokens.length);
    output.dataset.hint = shown.hint;
    set(output, "aria-label", `Output of ${shown.name}: ${shown.text || "nothing yet"}`);
  };

  // Buttons keep their node, and so the keyboard's focus, as long as they are offered.
  const paintSteering = (shown) => {
    const now = new Map([...steering.children].map((button) => [button.dataset.action, button]));
    const focused = [...now.values()].some((button) => button.matches(":focus"));
    const wanted = shown.steering.map(({ action, label, words }) => {
      const button = now.get(action) ?? make("button", "steer");
      if (!button.dataset.action) {
        button.type = "button";
        button.dataset.action = action;
        button.addEventListener("click", () => choose({ action }));
      }
      if (button.textContent !== label) button.textContent = label;
      button.title = words;
      set(button, "aria-label", `${label}: ${shown.name}`);
      return button;
    });
    for (const [action, button] of now) if (!wanted.includes(button)) button.remove();
    wanted.forEach((button, i) => { if (steering.children[i] !== button) steering.insertBefore(button, steering.children[i] ?? null); });
    if (focused && ![...steering.children].some((button) => button.matches(":focus"))) (wanted[0] ?? output).focus();
  };

  const paintMeter = (shown) => {
    const data = shown.meter;
    meter.replaceChildren();
    meter.hidden = !data;
    if (!data) return;
    const line = make("div", "sum", meter);
    make("strong", "", line, data.used);
    make("span", "", line, data.of);
    const track = make("div", "track", meter);
    set(track, "role", "img");
    set(track, "aria-label", data.words);
    const place = (name, left, width, words) => {
      const part = make("div", name, track);
      part.style.left = `${left}%`;
      if (width !== null) part.style.width = `${width}%`;
      if (words) part.title = words;
      return part;
    };
    let at = 0;
    for (const part of data.parts) { place(`part ${part.kind}`, at, part.share, part.words); at += part.share; }
    if (data.reserved.share > 0) place("part reserved", at, data.reserved.share, data.reserved.words);
    place("ghost", 0, data.ghost, data.ghost_words);
    if (data.nominal !== null) place("nominal", data.nominal, null, data.nominal_words);
    if (data.peak !== null) place("peak", data.peak, null, data.peak_words);
    const key = make("ul", "key", meter);
    for (const part of [...data.parts, ...(data.reserved.share > 0 ? [data.reserved] : []), ...data.marks]) {
      const item = make("li", "", key);
      make("i", `swatch ${part.kind}`, item);
      make("span", "", item, part.words);
    }
  };

  let last = {};
  const fresh = (name, value) => {
    const text = JSON.stringify(value);
    if (last[name] === text) return false;
    last[name] = text;
    return true;
  };
  const paint = () => {
    const shown = model.get("shown");
    if (!shown?.name) return;
    root.style.setProperty("--lane", shown.colour);
    set(root, "aria-label", shown.name);
    for (const [name, value] of Object.entries({ lane: shown.letter, key: shown.key, run: shown.run, status: shown.status })) {
      root.dataset[name] = value;
    }
    badge.textContent = shown.letter;
    badge.dataset.dash = shown.dash;
    title.textContent = shown.title;
    recipe.textContent = shown.recipe;
    recipe.title = shown.recipe;
    for (const button of actions.children) {
      set(button, "aria-label", `${button.dataset.words}: ${shown.name}`);
      button.title = button.dataset.words;
      button.disabled = shown.disabled.includes(button.dataset.action);
    }
    said.textContent = shown.said;
    const fraction = shown.progress;
    rail.hidden = fraction === null;
    bar.style.width = `${100 * (fraction ?? 0)}%`;
    set(rail, "role", "progressbar");
    set(rail, "aria-label", shown.said);
    set(rail, "aria-valuenow", fraction === null ? null : Math.round(100 * fraction));
    trouble.hidden = !shown.error;
    trouble.textContent = shown.error ?? "";
    if (fresh("tokens", [shown.tokens, shown.picked, shown.stale, shown.hint, shown.name])) paintTokens(shown);
    if (fresh("steering", [shown.steering, shown.name])) paintSteering(shown);
    if (fresh("marks", shown.marks)) marks.replaceChildren(...shown.marks.map((text) => make("li", "", null, text)));
    if (fresh("meter", shown.meter)) paintMeter(shown);
    if (fresh("facts", shown.facts)) facts.replaceChildren(...shown.facts.map((text) => make("span", "", null, text)));
    root.dataset.tokens = shown.stale ? 0 : shown.tokens.length;
  };
  paint();
  model.on("change:shown", paint);
  return () => { model.off("change:shown", paint); root.remove(); };
}

export default { render };

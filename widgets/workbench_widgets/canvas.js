// What every canvas component shares: reading traits, colours, numbers, the hover bus, and a stage that owns the
// nodes, sizes, theme, pointer and keyboard. Python puts this text in the place of a component's import line
// (workbench_widgets.base.module_text), so that a browser receives one module without imports.

// bokeh.palettes.Cividis256, 256 times rrggbb (tests/widgets compares them)
const CIVIDIS =
  "00204c00204e00215000225100235300235500245600255800265a00265b00275d00285f002861002963002a64002a66002b68002c6a002d6c002d6d002e6e002e6f002f6f002f6f00306f00316f00316f00326e00336e00346e00346e01356e06366e0a376d0e376d12386d15396d17396d1a3a6c1c3b6c1e3c6c203c6c223d6c243e6c263e6c273f6c29406b2b416b2c416b2e426b2f436b31446b32446b33456b35466b36466b37476b38486b3a496b3b496b3c4a6b3d4b6b3e4b6b404c6b414d6b424e6b434e6b444f6b45506b46506b47516b48526b49536b4a536b4b546b4c556b4d556b4e566b4f576c50586c51586c52596c535a6c545a6c555b6c565c6c575d6d585d6d595e6d5a5f6d5b5f6d5c606d5d616e5e626e5f626e5f636e60646e61656f62656f63666f64676f65676f666870676970686a70686a70696b716a6c716b6d716c6d726d6e726e6f726f6f726f70737071737172737272747373747474757575757575757676767777767878767978777a79777b7a777b7b787c7b787d7c787e7d787f7e78807e78817f788280788381788481788582788683788784788885788985788a86788b87788c88788d88788e89788f8a78908b78918c78928c78938d78948e78958f78968f779790779891779992779a93779b93779c94779d95779e96769f9776a09876a19876a29976a39a75a49b75a59c75a69c75a79d75a89e74a99f74aaa074aba174aca173ada273aea373afa473b0a572b1a672b2a672b4a771b5a871b6a971b7aa70b8ab70b9ab70baac6fbbad6fbcae6ebdaf6ebeb06ebfb16dc0b16dc1b26cc2b36cc3b46cc5b56bc6b66bc7b76ac8b86ac9b869cab969cbba68ccbb68cdbc67cebd67d0be66d1bf66d2c065d3c065d4c164d5c263d6c363d7c462d8c561d9c661dbc760dcc860ddc95fdeca5edfcb5de0cb5de1cc5ce3cd5be4ce5be5cf5ae6d059e7d158e8d257e9d356ebd456ecd555edd654eed753efd852f0d951f1da50f3db4ff4dc4ef5dd4df6de4cf7df4bf9e049fae048fbe147fce246fde345ffe443ffe542ffe642ffe743ffe844ffe945";

/** Bytes of a trait; hosts give a DataView, or nothing at all for b"". */
export function bytesOf(value) {
  if (!value?.byteLength) return new Uint8Array(0);
  if (value instanceof ArrayBuffer) return new Uint8Array(value);
  return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
}

// copies: a buffer from the wire may not start on a multiple of 4
export const floatsOf = (value) => new Float32Array(bytesOf(value).slice().buffer);
export const intsOf = (value) => new Int32Array(bytesOf(value).slice().buffer);

/** Cividis colour [r, g, b] of t in 0…1. Much is far from the ground: dark on light, bright on dark. */
export function palette(t, dark) {
  const level = 6 * Math.round(255 * clamp(dark ? t : 1 - t, 0, 1));
  return [0, 2, 4].map((k) => parseInt(CIVIDIS.slice(level + k, level + k + 2), 16));
}

export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** Where a value lies in the colour range, 0…1. */
export function fraction(value, low, high, log = false) {
  if (log) return value <= 0 ? 0 : clamp(Math.log(value / low) / Math.log(high / low), 0, 1);
  return clamp((value - low) / (high - low), 0, 1);
}

/** Relative luminance (WCAG) of [r, g, b]. */
export function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Black or white, whichever reads better on the colour: never below 4.5:1. */
export const inkOn = (rgb) => (luminance(rgb) > 0.179 ? [0, 0, 0] : [255, 255, 255]);

export const css = (rgb, alpha = 1) => `rgba(${rgb.join(", ")}, ${alpha})`;

export const count = (n) => n.toLocaleString("en-US");

/** A number in its unit. "%" takes fractions, "bytes" picks KiB, MiB or GiB, other units are named elsewhere. */
export function formatValue(value, unit = "", digits = 3) {
  if (Number.isNaN(value)) return "—";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const short = (x) => {
    const size = Math.abs(x);
    const plain = size >= 10 ** digits ? Math.round(x) : Number(x.toPrecision(digits));
    return (size && (size < 0.001 || size >= 1e6) ? x.toExponential(digits - 2) : String(plain)).replaceAll("-", "−");
  };
  if (unit === "%") return `${short(100 * value)} %`;
  if (unit === "bytes") {
    const step = clamp(Math.floor(Math.log2(Math.abs(value) || 1) / 10), 0, 3);
    return `${short(value / 1024 ** step)} ${["B", "KiB", "MiB", "GiB"][step]}`;
  }
  return short(value);
}

/** Diagonal lines, the sign for "not here". */
export function hatch(ctx, x, y, width, height, colour, step = 5) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(x, y, width, height);
  ctx.clip();
  ctx.beginPath();
  const first = Math.ceil((x + y) / step) * step;                  // one grid for all boxes: neighbours join up
  for (let d = first; d < x + width + y + height; d += step) {
    ctx.moveTo(d - y, y);
    ctx.lineTo(d - y - height, y + height);
  }
  ctx.strokeStyle = colour;
  ctx.lineWidth = 1;
  ctx.stroke();
  ctx.restore();
}

/** Text cut with … so that it fits. */
export function fitText(ctx, text, width) {
  if (ctx.measureText(text).width <= width) return text;
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (ctx.measureText(`${text.slice(0, middle)}…`).width <= width) low = middle;
    else high = middle - 1;
  }
  return `${text.slice(0, low)}…`;
}

function parseColour(ctx, text, fallback) {
  ctx.fillStyle = fallback;
  ctx.fillStyle = text.trim();                                     // a canvas turns any CSS colour into #rrggbb or rgba()
  const hex = /^#(..)(..)(..)$/.exec(ctx.fillStyle);
  const parts = hex ? hex.slice(1).map((part) => parseInt(part, 16)) : ctx.fillStyle.match(/[\d.]+/g).map(Number);
  return parts.slice(0, 3);
}

function readTheme(root, ctx, tint) {
  const style = getComputedStyle(root);
  const named = (name, fallback) => parseColour(ctx, style.getPropertyValue(name), fallback);
  const ink = parseColour(ctx, style.color, "#1a1a1a");
  const ground = named("--kvw-ground", "#ffffff");
  const accent = named("--kvw-accent", "#1976d2");
  return {
    ink, ground, accent, tint: tint ? parseColour(ctx, tint, css(accent)) : accent,
    dark: luminance(ink) > luminance(ground),
    sans: style.fontFamily, mono: style.getPropertyValue("--kvw-mono") || "monospace",
  };
}

/**
 * One canvas with its readout and tooltip. The view gives
 *   plan(ctx, theme, width) -> [width, height]   paint(ctx, theme)       label() -> aria-label
 *   at(x, y) -> what is there or null            tell(thing) -> text     aim(thing or null, "pointer" | "keys")
 *   choice(thing) -> fields of `selected`, null  pick(thing)             key(name) -> thing or null
 *   heard(detail) of another view                press(x, y, dragging) -> true where a drag begins (optional)
 *   box(...) -> where a thing is drawn           facts(thing) -> what read() adds, for tests
 */
export function stage(model, el, view) {
  const page = el.ownerDocument;
  const win = page.defaultView;
  const make = (tag, name, parent) => {
    const node = parent.appendChild(page.createElement(tag));
    node.className = name;
    return node;
  };
  const root = make("div", "kvw", el);
  const canvas = make("canvas", "kvw-canvas", make("div", "kvw-scroll", root));
  const live = make("div", "kvw-live", root);
  const tip = make("div", "kvw-tip", root);
  const ctx = canvas.getContext("2d");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  live.setAttribute("aria-live", "polite");
  tip.setAttribute("aria-hidden", "true");
  tip.hidden = true;

  const undo = [];
  let [frame, closed, drawnWidth, dragging, dragged] = [0, false, 0, false, false];

  const draw = () => {
    frame = 0;
    drawnWidth = root.clientWidth;
    if (closed || !drawnWidth) return;
    const theme = readTheme(root, ctx, model.get("tint"));
    const scale = win.devicePixelRatio || 1;
    const [width, height] = view.plan(ctx, theme, drawnWidth);
    const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== wide || canvas.height !== high) {
      [canvas.width, canvas.height] = [wide, high];
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    ctx.save();
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    view.paint(ctx, theme);
    ctx.restore();
    const label = view.label();
    if (canvas.getAttribute("aria-label") !== label) canvas.setAttribute("aria-label", label);
  };
  const redraw = () => { if (!closed) frame ||= win.requestAnimationFrame(draw); };

  const listen = (target, type, act, options) => {
    target.addEventListener(type, act, options);
    undo.push(() => target.removeEventListener(type, act, options));
  };
  const heed = (names, act) => names.forEach((name) => {
    const once = () => { act(); redraw(); };
    model.on(`change:${name}`, once);
    undo.push(() => model.off(`change:${name}`, once));
  });

  // hover: {group, token, layer, head}; a field left out says nothing, null says "none"
  const send = (detail) => {
    const group = model.get("group");
    if (group) win.dispatchEvent(new win.CustomEvent("kvw:hover", { detail: { group, ...detail } }));
  };
  listen(win, "kvw:hover", ({ detail }) => {
    if (detail?.group && detail.group === model.get("group")) { view.heard(detail); redraw(); }
  });

  const hideTip = () => { tip.hidden = true; };
  const showTip = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const left = clamp(x + 14, 0, Math.max(0, root.clientWidth - tip.offsetWidth));
    tip.style.left = `${left}px`;
    tip.style.top = `${y > canvas.clientHeight / 2 ? y - tip.offsetHeight - 10 : y + 20}px`;
  };
  const left = () => canvas.parentNode.scrollLeft;
  const leave = () => { hideTip(); view.aim(null, "pointer"); redraw(); };
  listen(canvas, "pointermove", (event) => {
    const [x, y] = [event.offsetX, event.offsetY];
    if (dragging) { view.press(x, y, true); redraw(); }
    const thing = view.at(x, y);
    if (!thing) return leave();
    showTip(view.tell(thing), x - left(), y);
    view.aim(thing, "pointer");
    redraw();
  });
  listen(canvas, "pointerleave", leave);
  listen(canvas, "pointerdown", (event) => {
    dragged = dragging = event.button === 0 && Boolean(view.press?.(event.offsetX, event.offsetY, false));
    if (dragging) { canvas.setPointerCapture(event.pointerId); redraw(); }
  });
  const drop = () => { dragging = false; };
  listen(canvas, "pointerup", drop);
  listen(canvas, "pointercancel", drop);
  const choose = (thing) => {
    view.pick(thing);
    const before = model.get("selected");                          // counts up, so that the same choice is news again
    const n = (before?.n ?? before?.get?.("n") ?? 0) + 1;
    model.set("selected", { n, ...view.choice(thing) });
    model.save_changes();
    live.textContent = `Selected: ${view.tell(thing)}`;
    redraw();
  };
  listen(canvas, "click", (event) => {
    const thing = dragged ? null : view.at(event.offsetX, event.offsetY);
    if (thing && view.choice(thing)) choose(thing);
  });
  listen(canvas, "keydown", (event) => {
    if (event.altKey || event.metaKey || event.ctrlKey) return;
    const enter = event.key === "Enter" || event.key === " ";
    const thing = view.key(enter ? "" : event.key);
    if (!thing) return;
    event.preventDefault();
    hideTip();
    view.aim(thing, "keys");
    if (enter) choose(thing);
    else live.textContent = view.tell(thing);
    redraw();
  });
  listen(canvas, "blur", () => { view.aim(null, "keys"); redraw(); });

  const size = new win.ResizeObserver(() => { if (root.clientWidth !== drawnWidth) redraw(); });
  size.observe(root);
  // canvas.css gives the root's theme colours a transition of 1 ms, whose end is the only news of a theme change that
  // holds in every host: Panel's toggle changes a style sheet and no attribute, JupyterLab an attribute and then a sheet
  listen(root, "transitionend", redraw);
  listen(root, "transitioncancel", redraw);                        // hidden meanwhile, as JupyterLab's cells are for a moment
  listen(page.fonts, "loadingdone", redraw);
  const followScale = () => {
    const query = win.matchMedia(`(resolution: ${win.devicePixelRatio}dppx)`);
    const change = () => { redraw(); if (!closed) followScale(); };
    query.addEventListener("change", change, { once: true });
    undo.push(() => query.removeEventListener("change", change));
  };
  followScale();

  const pixel = (x, y) => {
    const scale = win.devicePixelRatio || 1;
    return [...ctx.getImageData(Math.round(x * scale), Math.round(y * scale), 1, 1).data];
  };
  const read = (x, y) => {                                         // for tests: what is drawn under a CSS pixel
    const thing = view.at(x, y);
    return thing && { ...thing, ...view.facts(thing), pixel: pixel(x, y) };
  };
  el.__kvw = canvas.__kvw = { read, pixel, box: view.box };

  redraw();
  const close = () => {
    closed = true;
    win.cancelAnimationFrame(frame);
    size.disconnect();
    undo.forEach((act) => act());
    delete el.__kvw;
    root.remove();
  };
  return { redraw, heed, send, close };
}

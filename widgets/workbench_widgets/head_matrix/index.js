import { bytesOf, clamp, css, floatsOf, formatValue, fraction, hatch, inkOn, palette, stage } from "../canvas.js";

/** Places of the cells for a view `width` CSS pixels wide; `top` is where the column labels begin. */
export function layout(width, layers, heads, top) {
  const x0 = 16 + 7 * `L${layers - 1}`.length;
  const cw = clamp(Math.floor((width - x0 - 1) / heads), 8, 96);
  const ch = clamp(Math.floor(420 / layers), 8, 28);
  return { x0, y0: top + 20, cw, ch, layers, heads, width: Math.max(width, x0 + heads * cw + 1), height: top + 21 + layers * ch };
}

/** The cell {layer, head} under a point, or null. */
export function cellAt(grid, x, y) {
  const [head, layer] = [Math.floor((x - grid.x0) / grid.cw), Math.floor((y - grid.y0) / grid.ch)];
  return layer >= 0 && layer < grid.layers && head >= 0 && head < grid.heads ? { layer, head } : null;
}

/** The cell an arrow, Home (first head) or End (last head) leads to; "" stays, other keys give null. */
export function moved(cell, key, layers, heads) {
  const step = { "": [0, 0], ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    Home: [0, -heads], End: [0, heads] }[key];
  return step ? { layer: clamp(cell.layer + step[0], 0, layers - 1), head: clamp(cell.head + step[1], 0, heads - 1) } : null;
}

/** Label every 1st, 2nd, 5th, 10th… row or column, so that labels `need` pixels long do not touch. */
export const labelStep = (need, size) => [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100].find((n) => n * size >= need) ?? 128;

/** A disc (1: has it) or a cross (2: has it not) of radius 4 around a point. */
export function paintSign(ctx, sign, x, y, colour) {
  ctx.setLineDash([]);
  ctx.beginPath();
  if (sign === 1) {
    ctx.arc(x, y, 4, 0, 2 * Math.PI);
    ctx.fillStyle = colour;
    ctx.fill();
  } else if (sign === 2) {
    ctx.moveTo(x - 4, y - 4); ctx.lineTo(x + 4, y + 4);
    ctx.moveTo(x - 4, y + 4); ctx.lineTo(x + 4, y - 4);
    [ctx.strokeStyle, ctx.lineWidth] = [colour, 1.8];
    ctx.stroke();
  }
}

function render({ model, el }) {
  const get = (name) => model.get(name);
  let values, signs, layers, heads, grid, legend, picked;
  let pointed = null;                                              // the cell hovered here or in a linked view
  let cursor = null;                                               // the cell the keyboard is on, while it is

  const load = () => {
    values = floatsOf(get("values"));
    signs = bytesOf(get("signs"));
    [layers, heads] = get("shape") ?? [0, 0];
    if (values.length < layers * heads) [layers, heads] = [0, 0];
    const inside = (cell) => cell && cell.layer < layers && cell.head < heads ? cell : null;
    [pointed, cursor] = [inside(pointed), inside(cursor)];
    takePicked();
  };
  const takePicked = () => {
    const [layer, head] = get("picked") ?? [];
    picked = layer < layers && head < heads ? { layer, head } : null;
  };
  const value = ({ layer, head }) => values[layer * heads + head];
  const sign = ({ layer, head }) => signs[layer * heads + head] ?? 0;
  const signName = (cell) => (sign(cell) ? get("sign_names")[sign(cell) - 1] : null);
  const headName = (head) => `${get("head_label")}${head}`;
  const range = () => [get("low"), get("high"), get("log_scale")];
  const plainUnit = () => (["", "%", "bytes"].includes(get("unit")) ? "" : ` (${get("unit")})`);
  const tell = (cell) => {
    const number = value(cell);
    const text = Number.isNaN(number) ? "not applicable" : formatValue(number, get("unit"), 4) + plainUnit();
    return [`L${cell.layer} ${headName(cell.head)}`, signName(cell), `${get("metric")} ${text}`].filter(Boolean).join(" · ");
  };

  const plan = (ctx, theme, width) => {
    if (!layers || !heads) return [width, 96];
    // header: name of the metric, then the colour bar, beside it or below it
    const title = get("metric") + plainUnit();
    ctx.font = `600 13px ${theme.sans}`;
    const after = ctx.measureText(title).width + 24;
    const ends = [get("low"), get("high")].map((end) => formatValue(end, get("unit")));
    ctx.font = `12px ${theme.sans}`;
    const [lowWide, highWide] = ends.map((end) => ctx.measureText(end).width);
    const absent = values.subarray(0, layers * heads).some(Number.isNaN);
    const bar = clamp(width - lowWide - highWide - 20, 60, 140);
    const need = lowWide + bar + highWide + 12 + (absent ? 116 : 0) + (get("log_scale") ? 30 : 0);
    const beside = after + need <= width;
    legend = { title, ends, lowWide, highWide, bar, absent, x: beside ? after : 0, y: beside ? 4 : 24 };
    if (!beside && need > width) legend.wrap = true;
    legend.signs = legend.y + 20 + (legend.wrap ? 20 : 0);         // where the signs are explained, if there are any
    grid = layout(width, layers, heads, legend.signs + (signs.length ? 20 : 0) + (get("heads_per_kv") > 1 ? 14 : 0));
    return [grid.width, grid.height];
  };

  const paintLegend = (ctx, theme) => {
    const { title, ends, lowWide, highWide, bar, absent, x, y, wrap } = legend;
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    ctx.fillStyle = css(theme.ink);
    ctx.font = `600 13px ${theme.sans}`;
    ctx.fillText(title, 0, 12);
    ctx.font = `12px ${theme.sans}`;
    const middle = y + 8;
    const start = x + lowWide + 6;
    ctx.fillText(ends[0], x, middle);
    for (let i = 0; i < bar; i++) {
      ctx.fillStyle = css(palette(i / (bar - 1), theme.dark));
      ctx.fillRect(start + i, y + 2, 1.5, 12);
    }
    ctx.strokeStyle = css(theme.ink, 0.35);
    ctx.lineWidth = 1;
    ctx.strokeRect(start - 0.5, y + 1.5, bar + 1.5, 13);
    ctx.fillStyle = css(theme.ink);
    ctx.fillText(ends[1], start + bar + 6, middle);
    if (signs.length) {
      let at = 6;
      get("sign_names").forEach((name, i) => {
        const cells = signs.reduce((sum, one) => sum + (one === i + 1), 0);
        const text = `${name} in ${cells} of ${layers * heads} heads`;
        paintSign(ctx, i + 1, at, legend.signs + 9, css(theme.ink));
        ctx.fillStyle = css(theme.ink);
        ctx.fillText(text, at + 10, legend.signs + 9);
        at += ctx.measureText(text).width + 30;
      });
    }
    let next = start + bar + highWide + 12;
    if (get("log_scale")) { ctx.fillText("log", next + 6, middle); next += 30; }
    if (!absent) return;
    const [hx, hy] = wrap ? [0, y + 20] : [next + 8, y];
    hatch(ctx, hx, hy + 2, 16, 12, css(theme.ink, 0.5), 4);
    ctx.strokeRect(hx + 0.5, hy + 2.5, 15, 11);
    ctx.fillText("not applicable", hx + 22, hy + 8);
  };

  const box = ({ layer, head }) => ({
    x: grid.x0 + head * grid.cw, y: grid.y0 + layer * grid.ch,
    width: grid.cw - (grid.cw > 11 ? 1 : 0), height: grid.ch - (grid.ch > 9 ? 1 : 0),
  });

  const paintLabels = (ctx, theme) => {
    ctx.font = `12px ${theme.sans}`;
    ctx.fillStyle = css(theme.ink, 0.85);
    ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    const rows = labelStep(13, grid.ch);
    for (let layer = 0; layer < layers; layer += rows) {
      ctx.fillText(`L${layer}`, grid.x0 - 6, grid.y0 + (layer + 0.5) * grid.ch);
    }
    ctx.textAlign = "center";
    const columns = labelStep(ctx.measureText(headName(heads - 1)).width + 6, grid.cw);
    for (let head = 0; head < heads; head += columns) {
      ctx.fillText(headName(head), grid.x0 + (head + 0.5) * grid.cw - 0.5, grid.y0 - 10);
    }
    const group = get("heads_per_kv");
    if (group < 2) return;
    const every = labelStep(30, group * grid.cw);
    ctx.strokeStyle = css(theme.ink, 0.6);
    for (let kv = 0; kv * group < heads; kv++) {                   // a bracket over the query heads of one KV head
      const [x1, x2] = [grid.x0 + kv * group * grid.cw + 1, grid.x0 + Math.min(heads, (kv + 1) * group) * grid.cw - 2];
      ctx.beginPath();
      ctx.moveTo(x1, grid.y0 - 18); ctx.lineTo(x1, grid.y0 - 21); ctx.lineTo(x2, grid.y0 - 21); ctx.lineTo(x2, grid.y0 - 18);
      ctx.stroke();
      if (kv % every === 0) ctx.fillText(`KV${kv}`, (x1 + x2) / 2, grid.y0 - 28);
    }
  };

  const outline = (ctx, cell, theme, dash) => {
    const { x, y, width, height } = box(cell);
    ctx.setLineDash([]);
    ctx.strokeStyle = css(theme.ground);
    ctx.lineWidth = 5;
    ctx.strokeRect(x, y, width, height);
    ctx.setLineDash(dash);
    ctx.strokeStyle = css(theme.ink);
    ctx.lineWidth = 2;
    ctx.strokeRect(x, y, width, height);
    ctx.setLineDash([]);
  };

  const paint = (ctx, theme) => {
    if (!layers || !heads) {
      ctx.font = `13px ${theme.sans}`;
      ctx.fillStyle = css(theme.ink, 0.85);
      [ctx.textAlign, ctx.textBaseline] = ["left", "middle"];
      ctx.fillText(get("hint"), 0, 48);
      return;
    }
    paintLegend(ctx, theme);
    paintLabels(ctx, theme);
    const unit = get("unit");
    const texts = Array.from(values.subarray(0, layers * heads), (v) => formatValue(v, unit));
    ctx.font = `12px ${theme.sans}`;
    const beside = signs.length ? 16 : 0;                          // room for a sign left of the number
    const roomy = grid.ch >= 15 && grid.cw >= 28 && texts.every((text) => ctx.measureText(text).width + 8 + beside <= grid.cw);
    ctx.textAlign = "center";
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) {
        const { x, y, width, height } = box({ layer, head });
        const v = values[layer * heads + head];
        const colour = palette(fraction(v, ...range()), theme.dark);
        if (Number.isNaN(v)) {
          ctx.strokeStyle = css(theme.ink, 0.3);
          ctx.lineWidth = 1;
          ctx.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
          hatch(ctx, x, y, width, height, css(theme.ink, 0.35));
        } else {
          ctx.fillStyle = css(colour);
          ctx.fillRect(x, y, width, height);
        }
        const middle = x + (width + beside) / 2;
        const ink = css(Number.isNaN(v) ? theme.ink : inkOn(colour));
        if (Number.isNaN(v) && (roomy || beside)) {
          const wide = roomy ? 18 + beside : 12;
          ctx.fillStyle = css(theme.ground);
          ctx.fillRect(x + (width - wide) / 2, y + height / 2 - 7, wide, 14);
        }
        if (beside) paintSign(ctx, sign({ layer, head }), roomy ? x + 11 : x + width / 2, y + height / 2, ink);
        if (!roomy) continue;
        ctx.fillStyle = ink;
        ctx.fillText(texts[layer * heads + head], middle, y + height / 2 + 0.5);
      }
    }
    if (picked) outline(ctx, picked, theme, []);
    const here = cursor ?? pointed;
    if (here) outline(ctx, here, theme, [3, 3]);
  };

  const label = () => {
    if (!layers || !heads) return get("hint");
    const cells = Array.from({ length: layers * heads }, (_, i) => ({ layer: Math.floor(i / heads), head: i % heads }));
    const known = cells.filter((cell) => !Number.isNaN(value(cell))).sort((a, b) => value(a) - value(b));
    const ends = known.length ? `Lowest: ${tell(known[0])}. Highest: ${tell(known.at(-1))}.` : "No values apply.";
    const told = get("sign_names").map((name, i) => `${name} in ${cells.filter((cell) => sign(cell) === i + 1).length}`);
    const about = signs.length ? ` ${told.join(", ")} heads.` : "";
    return `${get("metric")}, ${layers} layers by ${heads} heads.${about} ${ends} Arrow keys move, Enter selects.`;
  };

  const same = (a, b) => a?.layer === b?.layer && a?.head === b?.head;
  const view = stage(model, el, {
    plan, paint, label, tell, box,
    at: (x, y) => (grid && layers ? cellAt(grid, x, y) : null),
    facts: (cell) => ({ value: value(cell), sign: signName(cell), text: tell(cell) }),
    aim: (cell, by) => {
      const before = cursor ?? pointed;
      if (by === "keys") cursor = cell;
      else { pointed = cell; if (cell) cursor = null; }
      const here = cursor ?? pointed;
      if (!same(before, here)) view.send({ layer: here?.layer ?? null, head: here?.head ?? null });
    },
    key: (key) => (layers && heads ? moved(cursor ?? picked ?? { layer: 0, head: 0 }, key, layers, heads) : null),
    choice: (cell) => ({ ...cell }),
    pick: (cell) => { picked = cell; model.set("picked", [cell.layer, cell.head]); },
    heard: ({ layer, head }) => {
      if (layer === undefined || head === undefined) return;
      pointed = layer >= 0 && layer !== null && layer < layers && head !== null && head < heads ? { layer, head } : null;
    },
  });
  load();
  view.heed(["seq"], load);
  view.heed(["picked"], takePicked);
  view.heed(["hint"], () => {});
  return view.close;
}

export default { render };

import { bytesOf, clamp, count, css, fitText, floatsOf, formatValue, hatch, intsOf, stage } from "../canvas.js";

const WINDOW = 400;                                                // tokens drawn as text at most
const ROW = 27;                                                    // CSS pixels of one line of token boxes
const BOX = 20;

const HEX = (code, digits) => code.toString(16).toUpperCase().padStart(digits, "0");

/** A token's text with everything seen: · space, ↵ newline, ⇥ tab, ⟨0xE2⟩ a byte, ∅ nothing. */
export function visibleText(text) {
  const byte = /^<0x([0-9a-f]{2})>$/i.exec(text);
  if (byte) return `⟨0x${byte[1].toUpperCase()}⟩`;
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥")
    .replace(/[\0-\x1f\x7f-\x9f]/g, (c) => `⟨0x${HEX(c.charCodeAt(0), 2)}⟩`)
    .replace(/[\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, (c) => `⟨U+${HEX(c.charCodeAt(0), 4)}⟩`) || "∅";
}

/** [from, to): at most `limit` of `total` tokens, around the cursor, as many as there are. */
export function windowAround(cursor, total, limit = WINDOW) {
  const from = clamp(cursor - (limit >> 1), 0, Math.max(0, total - limit));
  return [from, Math.min(total, from + limit)];
}

/** [from, to): the tokens under pixel `x` of a strip that shows `total` tokens on `pixels` pixels. */
export function pixelTokens(x, total, pixels) {
  const from = clamp(Math.floor((x * total) / pixels), 0, total - 1);
  return [from, clamp(Math.floor(((x + 1) * total) / pixels), from + 1, total)];
}

/** Mean and maximum per pixel, NaN where no token has a value. One pass; needles survive in the maximum. */
export function density(values, pixels) {
  const [mean, max] = [new Float32Array(pixels).fill(NaN), new Float32Array(pixels).fill(NaN)];
  for (let x = 0; values.length && x < pixels; x++) {
    const [from, to] = pixelTokens(x, values.length, pixels);
    let [sum, seen, most] = [0, 0, -Infinity];
    for (let i = from; i < to; i++) {
      const v = values[i];
      if (v === v) { sum += v; seen++; if (v > most) most = v; }
    }
    if (seen) { mean[x] = sum / seen; max[x] = most; }
  }
  return { mean, max };
}

/** Boxes {token, x, row, width} of tokens from `start` in lines of text; stops at `end` or when `rows` are full. */
export function flow(widthOf, start, end, lineWidth, rows, gap = 2) {
  const boxes = [];
  let [x, row] = [0, 0];
  for (let token = start; token < end; token++) {
    const width = Math.min(widthOf(token), lineWidth);
    if (x && x + width > lineWidth) [x, row] = [0, row + 1];
    if (row >= rows) break;
    boxes.push({ token, x, row, width });
    x += width + gap;
  }
  return boxes;
}

/** First token of a page of text that holds the cursor about in its middle, and no empty tail. */
export function pageStart(widthOf, cursor, total, lineWidth, rows) {
  const [from, to] = windowAround(cursor, total);
  const back = (token, share) => {
    let room = share * lineWidth * rows;
    while (token > from && room > 0) room -= Math.min(widthOf(--token), lineWidth) + 2;
    return token;
  };
  let start = Math.min(back(cursor, 0.45), to === total ? back(total, 0.85) : total);
  while (start < cursor && !flow(widthOf, start, to, lineWidth, rows).some((box) => box.token === cursor)) {
    start = Math.ceil((start + cursor) / 2);
  }
  return start;
}

function swatch(ctx, theme, look, x, y, width, height) {
  const tint = (alpha) => css(theme.tint, alpha);
  const edge = (style, dash = [], line = 1) => {
    ctx.setLineDash(dash);
    [ctx.strokeStyle, ctx.lineWidth] = [style, line];
    ctx.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
    ctx.setLineDash([]);
  };
  const fill = (alpha) => { ctx.fillStyle = tint(alpha); ctx.fillRect(x, y, width, height); };
  if (look === "filled") { fill(theme.dark ? 0.5 : 0.38); edge(tint(1)); }
  if (look === "hatched") { hatch(ctx, x, y, width, height, css(theme.ink, 0.28), 6); edge(css(theme.ink, 0.16)); }
  if (look === "dotted") {
    fill(0.1);
    ctx.fillStyle = tint(1);
    for (let i = x + 3; i < x + width - 1; i += 4) {
      for (let j = y + 3; j < y + height - 1; j += 4) ctx.fillRect(i, j, 1.4, 1.4);
    }
    edge(tint(0.8), [1.5, 2.5]);
  }
  if (look === "bracket") {
    fill(0.14);
    [ctx.strokeStyle, ctx.lineWidth] = [css(theme.ink), 1.5];
    ctx.beginPath();
    for (const [side, inward] of [[x + 1, 4], [x + width - 1, -4]]) {
      ctx.moveTo(side + inward, y + 1); ctx.lineTo(side, y + 1); ctx.lineTo(side, y + height - 1); ctx.lineTo(side + inward, y + height - 1);
    }
    ctx.stroke();
  }
  if (look === "double") { edge(tint(1), [], 1.5); ctx.strokeRect(x + 3.5, y + 3.5, width - 7, height - 7); }
  if (look === "dashed") edge(css(theme.ink, 0.55), [4, 3]);
}

function render({ model, el }) {
  const get = (name) => model.get(name);
  let texts, status, score, share, positions, held, total, legend, marks, picked, pooled, plot, boxes;
  let start = 0;                                                   // first token of the page of text
  let at = 0;                                                      // the token the keyboard is on
  let keyed = false;
  let pointed = null;                                              // the token hovered here or in a linked view
  let page = true;                                                 // the page of text must be chosen anew

  const load = () => {
    status = bytesOf(get("status"));
    [score, share, positions] = [floatsOf(get("score")), floatsOf(get("share")), intsOf(get("positions"))];
    texts = (get("tokens") || "").split("\0");
    marks = (get("marks") ?? []).filter((token) => token < status.length);
    legend = JSON.parse(get("legend") || "[]").map((entry) => ({ ...entry, tokens: 0 }));
    const byCode = [];
    for (const entry of legend) byCode[entry.code] = entry;
    held = new Float32Array(status.length);
    for (let i = 0; i < status.length; i++) {
      const entry = byCode[status[i]];
      held[i] = entry?.held ?? NaN;
      if (entry) entry.tokens++;
    }
    pooled = null;
    page = page || total !== status.length;
    if (total !== status.length) at = get("picked") >= 0 ? get("picked") : marks[0] ?? 0;
    total = status.length;
    at = clamp(at, 0, Math.max(0, total - 1));
    if (pointed >= total) pointed = null;
    takePicked();
  };
  const takePicked = () => {
    picked = get("picked") ?? -1;
    if (picked >= 0 && picked < total && picked !== at) { at = picked; page = true; }
  };
  const look = (token) => legend.find((entry) => entry.code === status[token]);
  const tell = (thing) => {
    if (thing.token === undefined) {
      const { from, to } = thing;
      const some = (values) => {
        const { mean, max } = density(values.subarray(from, to), 1);
        return Number.isNaN(mean[0]) ? "unknown" : `mean ${formatValue(mean[0], "%")}, max ${formatValue(max[0], "%")}`;
      };
      return `tokens ${count(from)} to ${count(to - 1)}${share.length ? `\nkept over all heads: ${some(share)}` : ""}\nkept by this head: ${some(held)}`;
    }
    const { token } = thing;
    return [`token ${count(token)} “${visibleText(texts[token] ?? "")}”`, positions.length && `position ${count(positions[token])}`,
      look(token)?.name ?? "unknown", score.length && `score ${formatValue(score[token], "", 4)}`,
      share.length && `kept by ${formatValue(share[token], "%", 4)} of all heads`, marks.includes(token) && "marked"].filter(Boolean).join(" · ");
  };

  const plan = (ctx, theme, width) => {
    if (!total) return [width, 96];
    ctx.font = `12px ${theme.sans}`;
    let [x, y] = [0, get("title") ? 24 : 0];
    const entries = [...legend.filter((entry) => entry.tokens), ...(marks.length ? [{ name: "marked", tokens: marks.length }] : [])];
    const key = entries.map((entry) => {
      const text = `${entry.name} ${count(entry.tokens)}`;
      const wide = 30 + ctx.measureText(text).width;
      if (x && x + wide > width) [x, y] = [0, y + 20];
      const place = { ...entry, text, x, y };
      x += wide + 16;
      return place;
    });
    const pixels = Math.floor(width);
    const per = total / pixels;
    const what = `Whole prompt: ${share.length ? "share kept over all heads, below it this head" : "kept by this head"}`;
    const pooling = per > 1 ? `${formatValue(per)} tokens per pixel: solid mean, faint maximum` : "";
    const one = [what, pooling].filter(Boolean).join(" · ");
    const about = ctx.measureText(one).width <= width ? [one] : [what, pooling].filter(Boolean);
    const bars = y + 34 + 16 * about.length;
    const head = bars + 34;
    const axis = head + (share.length ? 12 : 2);
    const caption = axis + 20;
    const rows = width < 600 ? 12 : 9;
    ctx.font = `13px ${theme.mono}`;
    const known = new Map();
    const widthOf = (token) => {
      const text = visibleText(texts[token] ?? "");
      if (!known.has(text)) known.set(text, Math.ceil(ctx.measureText(text).width) + 8);
      return known.get(text);
    };
    if (page || !boxes?.some((box) => box.token === at) || plot?.width !== width) start = pageStart(widthOf, at, total, width, rows);
    page = false;
    boxes = flow(widthOf, start, Math.min(total, start + WINDOW), width, rows);
    const whole = boxes.length === total;
    plot = { key, about, bars, head, axis, caption, width, text: caption + 22, rows: whole ? boxes.at(-1).row + 1 : rows };
    if (pooled?.pixels !== pixels) {
      pooled = { pixels, head: density(held, pixels), all: share.length ? density(share, pixels) : null };
    }
    return [width, plot.text + plot.rows * ROW];
  };

  const triangle = (ctx, x, y) => {
    ctx.beginPath();
    ctx.moveTo(x - 4, y); ctx.lineTo(x + 4, y); ctx.lineTo(x, y + 6);
    ctx.fill();
  };
  const left = (token) => (token * plot.width) / total;

  const paintDensity = (ctx, theme) => {
    const { bars, head, axis, width } = plot;
    const { pixels } = pooled;
    ctx.fillStyle = css(theme.ink, 0.06);
    ctx.fillRect(0, bars, width, 32);
    if (share.length) ctx.fillRect(0, head + 1, width, 8);
    const bar = (values, base, height, alpha) => {
      ctx.fillStyle = css(theme.tint, alpha);
      for (let x = 0; x < pixels; x++) if (values[x] > 0) ctx.fillRect(x, base - values[x] * height, 1, values[x] * height);
    };
    const top = pooled.all ?? pooled.head;
    if (total > pixels) bar(top.max, bars + 32, 32, 0.35);
    bar(top.mean, bars + 32, 32, 1);
    if (share.length) {
      if (total > pixels) bar(pooled.head.max, head + 9, 8, 0.35);
      bar(pooled.head.mean, head + 9, 8, 1);
    }
    ctx.fillStyle = css(theme.ink);
    for (const token of marks) {
      const x = clamp(left(token + 0.5), 4, width - 4);
      triangle(ctx, x, bars - 8);
      ctx.fillRect(x - 0.5, bars - 2, 1, axis - bars + 2);
    }
    const raw = total / Math.max(2, width / 90);
    const size = 10 ** Math.floor(Math.log10(raw || 1));
    const step = Math.max(1, [1, 2, 5, 10].find((n) => n * size >= raw) * size);
    ctx.font = `11px ${theme.sans}`;
    for (let token = 0; token < total; token += step) {
      ctx.fillStyle = css(theme.ink, 0.4);
      ctx.fillRect(Math.floor(left(token)), axis, 1, 4);
      ctx.fillStyle = css(theme.ink, 0.85);
      const text = count(token);
      const wide = ctx.measureText(text).width;
      if (left(token) + wide / 2 <= width) ctx.fillText(text, Math.max(0, left(token) - wide / 2), axis + 11);
    }
    // the page of text below, then the token under the pointer or the keyboard
    const [from, to] = [boxes[0].token, boxes.at(-1).token + 1];
    if (to - from < total) {
      [ctx.strokeStyle, ctx.lineWidth] = [css(theme.ink), 2];
      const x = clamp(left(from), 1, width - 9);
      ctx.strokeRect(x, bars - 1, Math.max(8, Math.min(left(to), width - 1) - x), axis - bars + 1);
    }
    const here = keyed ? at : pointed;
    if (here !== null && here !== undefined) {
      ctx.fillStyle = css(theme.ground);
      ctx.fillRect(left(here + 0.5) - 2.5, bars, 5, axis - bars);
      ctx.fillStyle = css(theme.ink);
      ctx.fillRect(left(here + 0.5) - 1, bars - 4, 2, axis - bars + 6);
    }
  };

  const box = (token) => {
    const found = boxes?.find((b) => b.token === token);
    return found ? { x: found.x, y: plot.text + found.row * ROW + 6, width: found.width, height: BOX } : null;
  };

  const paintText = (ctx, theme) => {
    ctx.font = `13px ${theme.mono}`;
    [ctx.lineJoin, ctx.textAlign] = ["round", "left"];
    const marked = new Set(marks);
    for (const { token, x, row, width } of boxes) {
      const y = plot.text + row * ROW + 6;
      const entry = look(token);
      swatch(ctx, theme, entry?.look, x, y, width, BOX);
      const text = fitText(ctx, visibleText(texts[token] ?? ""), width - 6);
      if (entry?.look !== "filled") {                              // a halo keeps the letters clear of the pattern
        [ctx.strokeStyle, ctx.lineWidth] = [css(theme.ground, 0.85), 4];
        ctx.strokeText(text, x + 4, y + BOX / 2 + 0.5);
      }
      ctx.fillStyle = css(theme.ink, entry?.held ? 1 : 0.78);
      ctx.fillText(text, x + 4, y + BOX / 2 + 0.5);
      if (!marked.has(token)) continue;
      ctx.fillStyle = css(theme.ink);
      triangle(ctx, x + width / 2, y - 6);
      ctx.fillRect(x, y + BOX, width, 2);
    }
    const outline = (token, dash) => {
      const b = box(token);
      if (!b) return;
      for (const [colour, line, lines] of [[theme.ground, 5, []], [theme.ink, 2, dash]]) {
        ctx.setLineDash(lines);
        [ctx.strokeStyle, ctx.lineWidth] = [css(colour), line];
        ctx.strokeRect(b.x, b.y, b.width, b.height);
      }
      ctx.setLineDash([]);
    };
    outline(picked, []);
    outline(keyed ? at : pointed, [3, 3]);
  };

  const paint = (ctx, theme) => {
    [ctx.textAlign, ctx.textBaseline] = ["left", "middle"];
    ctx.fillStyle = css(theme.ink);
    ctx.font = `13px ${theme.sans}`;
    if (!total) return ctx.fillText(get("hint"), 0, 48);
    ctx.font = `600 13px ${theme.sans}`;
    ctx.fillText(fitText(ctx, get("title"), plot.width), 0, 10);
    ctx.font = `12px ${theme.sans}`;
    for (const entry of plot.key) {
      if (entry.look) swatch(ctx, theme, entry.look, entry.x, entry.y + 2, 22, 14);
      ctx.fillStyle = css(theme.ink);
      if (!entry.look) { triangle(ctx, entry.x + 11, entry.y + 5); ctx.fillRect(entry.x + 3, entry.y + 13, 16, 2); }
      ctx.fillText(entry.text, entry.x + 28, entry.y + 9.5);
    }
    ctx.fillStyle = css(theme.ink, 0.85);
    plot.about.forEach((line, i) => ctx.fillText(fitText(ctx, line, plot.width), 0, plot.bars - 2 - 16 * (plot.about.length - i)));
    paintDensity(ctx, theme);
    const far = pointed !== null && !box(pointed) ? `  ·  hovered: ${tell({ token: pointed })}` : "";
    ctx.font = `12px ${theme.sans}`;
    ctx.fillStyle = css(theme.ink, 0.85);
    ctx.fillText(fitText(ctx, `Tokens ${count(boxes[0].token)} to ${count(boxes.at(-1).token)} of ${count(total)}${far}`, plot.width), 0, plot.caption + 10);
    paintText(ctx, theme);
  };

  const label = () => {
    if (!total) return get("hint");
    const parts = legend.filter((entry) => entry.tokens).map((entry) => `${count(entry.tokens)} ${entry.name}`);
    return `${get("title") ? `${get("title")}. ` : ""}${count(total)} tokens: ${parts.join(", ")}. Arrow keys move, Enter selects.`;
  };

  const inStrip = (y) => total > 0 && plot && y >= plot.bars - 8 && y < plot.axis + 16;
  const where = (x, y) => {
    if (!total || !plot) return null;
    if (inStrip(y) && x >= 0 && x < plot.width) {
      const [from, to] = pixelTokens(Math.floor(x), total, pooled.pixels);
      return to - from > 1 ? { from, to } : { token: from, strip: true };
    }
    const row = Math.floor((y - plot.text - 3) / ROW);
    const found = boxes.find((b) => b.row === row && x >= b.x && x < b.x + b.width + 2);
    return found ? { token: found.token } : null;
  };

  const moved = (key) => {
    const index = boxes.findIndex((b) => b.token === at);
    const step = { "": 0, ArrowLeft: -1, ArrowRight: 1, Home: -total, End: total, PageUp: -boxes.length, PageDown: boxes.length }[key];
    if (step !== undefined) return at + step;
    if (key !== "ArrowUp" && key !== "ArrowDown") return null;
    const here = boxes[index] ?? boxes[0];
    const row = boxes.filter((b) => b.row === here.row + (key === "ArrowUp" ? -1 : 1));
    const middle = (b) => Math.abs(b.x + b.width / 2 - here.x - here.width / 2);
    if (row.length) return row.reduce((best, b) => (middle(b) < middle(best) ? b : best)).token;
    return key === "ArrowUp" ? boxes[0].token - 1 : boxes.at(-1).token + 1;
  };

  const view = stage(model, el, {
    plan, paint, label, tell, box,
    at: where,
    facts: (thing) => thing.token === undefined
      ? { mean: density((share.length ? share : held).subarray(thing.from, thing.to), 1).mean[0], text: tell(thing) }
      : { status: status[thing.token], name: look(thing.token)?.name, score: score[thing.token], share: share[thing.token],
          tokenText: visibleText(texts[thing.token] ?? ""), text: tell(thing) },
    aim: (thing, by) => {
      const before = keyed ? at : pointed;
      if (by === "keys") { keyed = Boolean(thing); if (thing) at = thing.token; }
      else { pointed = thing?.token ?? null; if (thing) keyed = false; }
      const here = keyed ? at : pointed;
      if (here !== before) view.send({ token: here });
    },
    key: (key) => {
      const token = total && boxes ? moved(key) : null;
      return token === null ? null : { token: clamp(token, 0, total - 1) };
    },
    press: (x, y, dragging) => {
      const hit = dragging || inStrip(y);
      if (hit) [at, page] = [clamp(Math.floor((x * total) / plot.width), 0, total - 1), true];
      return hit;
    },
    choice: (thing) => (thing.strip || thing.token === undefined ? null : { token: thing.token }),
    pick: ({ token }) => { [picked, at] = [token, token]; model.set("picked", token); },
    heard: ({ token }) => {
      if (token !== undefined) pointed = token !== null && token >= 0 && token < total ? token : null;
    },
  });
  load();
  view.heed(["seq"], load);
  view.heed(["picked"], takePicked);
  view.heed(["tint", "hint"], () => {});
  view.heed(["reveal"], () => {
    const canvas = el.querySelector("canvas");
    canvas.scrollIntoView({ block: "nearest" });
    canvas.focus({ preventScroll: true });
  });
  return view.close;
}

export default { render };

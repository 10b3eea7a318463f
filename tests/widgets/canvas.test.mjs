import assert from "node:assert/strict";
import { test } from "node:test";

import { bytesOf, fitText, floatsOf, formatValue, fraction, inkOn, intsOf, luminance, palette } from "../../widgets/workbench_widgets/canvas.js";

test("arrays arrive as views, buffers or nothing", () => {
  const buffer = new ArrayBuffer(13);
  new DataView(buffer).setFloat32(1, 0.5, true);
  new DataView(buffer).setInt32(5, -7, true);
  assert.deepEqual([...floatsOf(new DataView(buffer, 1, 4))], [0.5], "a float that starts on an odd byte");
  assert.deepEqual([...intsOf(new DataView(buffer, 5, 4))], [-7]);
  assert.equal(bytesOf(buffer).length, 13);
  for (const nothing of [null, undefined, "", {}, new ArrayBuffer(0), new DataView(new ArrayBuffer(0))]) {
    assert.equal(bytesOf(nothing).length, 0);
    assert.equal(floatsOf(nothing).length, 0);
  }
});

test("much stands out: dark on light ground, bright on dark ground", () => {
  assert.deepEqual(palette(1, false), palette(0, true));
  assert.ok(luminance(palette(1, false)) < 0.05 && luminance(palette(1, true)) > 0.6);
  assert.deepEqual(palette(7, true), palette(1, true), "values beyond the range take its end's colour");
});

test("numbers on any palette colour keep a contrast of 4.5:1", () => {
  for (let i = 0; i < 256; i++) {
    const [a, b] = [luminance(palette(i / 255, true)), luminance(inkOn(palette(i / 255, true)))];
    assert.ok((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) >= 4.5, `level ${i}`);
  }
});

test("a value's place in the range", () => {
  assert.equal(fraction(3, 1, 5), 0.5);
  assert.equal(fraction(9, 1, 5), 1);
  assert.equal(fraction(0.1, 0.01, 1, true), 0.5);
  assert.equal(fraction(0, 0.01, 1, true), 0);
});

test("numbers are written in their unit", () => {
  const cases = [
    [0.25, "%", "25 %"], [0.99966, "%", "100 %"], [0.0004, "%", "0.04 %"], [512, "bytes", "512 B"], [1536, "bytes", "1.5 KiB"],
    [3 * 1024 ** 3, "bytes", "3 GiB"], [0, "bytes", "0 B"], [0.01234, "nats", "0.0123"], [-2, "", "−2"], [4e-7, "", "4.0e−7"],
    [NaN, "%", "—"], [Infinity, "", "∞"], [12345, "", "12345"],
  ];
  for (const [value, unit, text] of cases) assert.equal(formatValue(value, unit), text);
  assert.equal(formatValue(0.99966, "%", 4), "99.97 %");
});

test("text is cut to its room", () => {
  const ctx = { measureText: (text) => ({ width: 10 * text.length }) };
  assert.equal(fitText(ctx, "needle", 60), "needle");
  assert.equal(fitText(ctx, "needles", 60), "needl…");
  assert.equal(fitText(ctx, "needles", 5), "…");
});

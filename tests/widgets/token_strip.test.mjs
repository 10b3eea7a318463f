import assert from "node:assert/strict";
import { test } from "node:test";

import { density, flow, pageStart, pixelTokens, visibleText, windowAround } from "../../widgets/workbench_widgets/token_strip/index.js";

test("everything in a token is seen", () => {
  const cases = [
    [" Oslo", "·Oslo"], ["a\n\n", "a↵↵"], ["\t", "⇥"], ["\r\n", "⟨0x0D⟩↵"], ["<0xe2>", "⟨0xE2⟩"], ["⟨0xE2⟩", "⟨0xE2⟩"], ["", "∅"],
    ["\u00a0", "⟨U+00A0⟩"], ["\u202eabc", "⟨U+202E⟩abc"], ["été 猫", "été·猫"], ["<0xe2>x", "<0xe2>x"],
  ];
  for (const [raw, seen] of cases) assert.equal(visibleText(raw), seen);
});

test("the window holds the cursor, and at most the limit", () => {
  assert.deepEqual(windowAround(5, 10), [0, 10]);
  assert.deepEqual(windowAround(0, 131072), [0, 400]);
  assert.deepEqual(windowAround(70000, 131072), [69800, 70200]);
  assert.deepEqual(windowAround(131071, 131072), [130672, 131072]);
  assert.deepEqual(windowAround(0, 0), [0, 0]);
});

test("the pixels share the tokens out: none twice, none left out", () => {
  for (const [total, pixels] of [[131072, 1280], [1000, 999], [640, 640]]) {
    let next = 0;
    for (let x = 0; x < pixels; x++) {
      const [from, to] = pixelTokens(x, total, pixels);
      assert.equal(from, next);
      next = to;
    }
    assert.equal(next, total);
  }
  assert.deepEqual([0, 1, 2, 3, 4, 5].map((x) => pixelTokens(x, 3, 6)), [[0, 1], [0, 1], [1, 2], [1, 2], [2, 3], [2, 3]]);
});

test("density is the mean and the maximum of the tokens under a pixel", () => {
  const { mean, max } = density(Float32Array.of(0, 1, 0.5, 0.25, NaN, 1, NaN, NaN), 4);
  assert.deepEqual([...mean], [0.5, 0.375, 1, NaN]);
  assert.deepEqual([...max], [1, 0.5, 1, NaN]);
  const needle = new Float32Array(131072);
  needle[70000] = 1;
  assert.equal(Math.max(...density(needle, 300).max), 1, "one token of 131,072 stays visible");
});

test("boxes flow into lines", () => {
  const widths = [30, 30, 30, 500, 10];
  const boxes = flow((i) => widths[i], 0, 5, 64, 9);
  assert.deepEqual(boxes.map(({ x, row, width }) => [x, row, width]), [[0, 0, 30], [32, 0, 30], [0, 1, 30], [0, 2, 64], [0, 3, 10]]);
  assert.equal(flow((i) => widths[i], 0, 5, 64, 2).length, 3);
});

test("a page of text holds its cursor wherever that is", () => {
  let seed = 1;
  const widths = Array.from({ length: 3000 }, () => 12 + ((seed = (seed * 48271) % 2147483647) % 290));
  for (const [total, width, rows] of [[3000, 320, 12], [3000, 1280, 9], [40, 320, 12], [1, 320, 12], [5, 1280, 9]]) {
    for (let cursor = 0; cursor < total; cursor += total > 100 ? 37 : 1) {
      const start = pageStart((i) => widths[i], cursor, total, width, rows);
      const tokens = flow((i) => widths[i], start, total, width, rows).map((box) => box.token);
      assert.ok(tokens.includes(cursor), `token ${cursor} of ${total}, page from ${start}`);
    }
    assert.equal(pageStart((i) => widths[i], 0, total, width, rows), 0);
  }
});

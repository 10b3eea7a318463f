import assert from "node:assert/strict";
import { test } from "node:test";

import { cellAt, labelStep, layout, moved } from "../../widgets/workbench_widgets/head_matrix/index.js";

test("a point finds its cell and nothing beside the cells", () => {
  const grid = layout(600, 6, 2, 24);
  for (let layer = 0; layer < 6; layer++) {
    for (let head = 0; head < 2; head++) {
      const [x, y] = [grid.x0 + head * grid.cw, grid.y0 + layer * grid.ch];
      assert.deepEqual(cellAt(grid, x, y), { layer, head });
      assert.deepEqual(cellAt(grid, x + grid.cw - 1, y + grid.ch - 1), { layer, head });
    }
  }
  assert.equal(cellAt(grid, grid.x0 - 1, grid.y0), null);
  assert.equal(cellAt(grid, grid.x0 + 2 * grid.cw, grid.y0), null);
  assert.equal(cellAt(grid, grid.x0, grid.y0 - 1), null);
  assert.equal(cellAt(grid, grid.x0, grid.y0 + 6 * grid.ch), null);
});

test("many heads widen the canvas, few fill no more than they need", () => {
  assert.equal(layout(320, 4, 2, 24).width, 320);
  const wide = layout(320, 32, 128, 24);
  assert.ok(wide.width > 1000 && wide.cw === 8 && wide.ch >= 8);
  assert.equal(layout(1280, 6, 2, 24).cw, 96);
});

test("keys move within the matrix", () => {
  const go = (key) => moved({ layer: 0, head: 1 }, key, 6, 3);
  assert.deepEqual(go("ArrowDown"), { layer: 1, head: 1 });
  assert.deepEqual(go("ArrowUp"), { layer: 0, head: 1 });
  assert.deepEqual(go("End"), { layer: 0, head: 2 });
  assert.deepEqual(go("Home"), { layer: 0, head: 0 });
  assert.deepEqual(go(""), { layer: 0, head: 1 });
  assert.equal(go("x"), null);
});

test("labels keep apart", () => {
  assert.equal(labelStep(30, 96), 1);
  assert.equal(labelStep(30, 8), 4);
});

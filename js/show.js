/** Moves ComfyUI's canvas. `app` is ComfyUI's; nothing here has side effects when imported. */

const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));

/**
 * Show `node`, also inside a subgraph: put it in the middle of the free part of the canvas and
 * select it. `sidebar` is the element that covers the rest, or null.
 */
export async function showNode(app, node, sidebar) {
  const { canvas } = app;
  if (node.graph && canvas.graph !== node.graph) {
    canvas.setGraph?.(node.graph);
    // The frontend puts the view of a subgraph back in the frames after it was opened.
    for (let i = 0; i < 3; i += 1) await frame();
  }
  const { ds } = canvas;
  const area = canvas.canvas.getBoundingClientRect();
  const covered = sidebar?.getBoundingClientRect();
  let [left, right] = [area.left, area.right];
  if (covered?.width) {
    if (covered.left - left <= right - covered.right) left = Math.max(left, covered.right);
    else right = Math.min(right, covered.left);
  }
  const [x, y] = [(left + right) / 2 - area.left, area.height / 2];
  ds.offset[0] = x / ds.scale - node.pos[0] - node.size[0] / 2;
  ds.offset[1] = y / ds.scale - node.pos[1] - node.size[1] / 2;
  canvas.selectNode?.(node, false);
  canvas.setDirty(true, true);
}

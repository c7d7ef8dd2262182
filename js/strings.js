/**
 * The texts of the panel and of the line on nodes. English is here. Other languages come from
 * "wanVae" in locales/<language>/main.json, which ComfyUI serves.
 */
export const ENGLISH = {
  "line.idle": "No report yet: run the workflow",
  "line.running": "{done} of {total} frames",
  "line.cancelled": "cancelled after {done} of {total} frames",
  "line.failed": "failed: {error}",
  "line.done": "{total} frames in {time}",
  "line.one_frame": "1 frame in {time}",
  "line.accelerate": "ready: no node has used it yet",
  "line.open": "Open the Wan VAE panel",
  "panel.title": "Wan VAE",
  "panel.empty": "No report yet",
  "panel.empty_hint":
    "Add a Wan VAE Decode node in place of VAE Decode, or Wan VAE, fast everywhere after Load VAE, and run the workflow. The report appears here.",
  "panel.show_node": "Show this node",
  "panel.copy": "Copy report",
  "panel.copied": "Copied",
  "panel.copy_failed": "The browser refused to copy",
  "status.running": "running",
  "status.done": "done",
  "status.cancelled": "cancelled",
  "status.failed": "failed",
  "section.layout": "Memory layout",
  "section.layers": "Layers",
  "section.chunks": "Chunks",
  "section.memory": "Memory",
  "section.shards": "Shards",
  "section.backends": "Kernels",
  "section.notes": "Notes",
  "layout.found": "Conv3d weights as loaded",
  "layout.used": "Conv3d weights as used",
  "layout.latent": "Latent",
  "layout.pixels": "Pixels",
  "layout.chosen": "Chosen",
  "layout.conversions": "Format conversions",
  "layout.mixed": "Calls with mixed formats (should be 0)",
  "layers.hint": "Each cell is one convolution. Use the arrow keys to move along the strip.",
  "layers.strip": "{count} convolutions by memory format",
  "chunks.summary": "{count} chunks: the first took {first}, the others {median} each",
  "chunks.one": "1 chunk in {first}",
  "chunks.bar": "Chunk {number}: {frames} frames in {time}",
  "chunks.strips": "{count} strips, one after another",
  "memory.free": "Free at the start",
  "memory.planned": "Planned",
  "memory.peak": "Peak",
  "memory.output": "Output",
  "memory.weights": "Weights",
  "shards.rank": "Rank",
  "shards.device": "Device",
  "shards.rows": "Rows",
  "shards.halo": "Halo",
  "shards.wait": "Waited",
  "backends.off": "{op}: {backend} is off: {reason}",
  "setting.line": "Show the report line on nodes",
  "setting.line_tip": "A line at the bottom of each Wan VAE node that says how its last run went.",
};

/**
 * Makes a function `t(key, values)` that looks up a text in `words`, then in English, and fills in
 * `{names}`. An unknown key is a mistake in this pack and throws.
 */
export function translator(words = {}) {
  return (key, values = {}) => {
    const text = words[key] ?? ENGLISH[key];
    if (text === undefined) throw new Error(`no text for ${key}`);
    return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
  };
}

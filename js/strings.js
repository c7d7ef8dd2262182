/**
 * The words of panel and line. English lives here; other languages come from
 * locales/<language>/main.json, under "wanVae", through ComfyUI's own route for them.
 */
export const ENGLISH = {
  "line.idle": "No report yet: run the workflow",
  "line.running": "{done} of {total} frames",
  "line.cancelled": "cancelled after {done} of {total} frames",
  "line.failed": "failed: {error}",
  "line.done": "{total} frames in {time}",
  "line.one_frame": "1 frame in {time}",
  "line.open": "Open the Wan VAE panel",
  "panel.title": "Wan VAE",
  "panel.empty": "No report yet",
  "panel.empty_hint":
    "Add a Wan VAE Decode node in place of VAE Decode, or Wan VAE Inspect beside Load VAE, and run the workflow. What happened shows up here.",
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
  "layout.conversions": "Inputs matched to their weight",
  "layout.mixed": "Mixed calls",
  "layers.hint": "One cell is one convolution. Arrow keys move along the strip.",
  "layers.strip": "{count} convolutions by memory format",
  "chunks.summary": "{count} chunks, {first} the first, {median} each after",
  "chunks.one": "1 chunk, {first}",
  "chunks.bar": "Chunk {number}: {frames} frames in {time}",
  "chunks.strips": "{count} strips in turn",
  "memory.free": "Free before",
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
  "setting.line_tip": "One line at the bottom of each Wan VAE node that says how its last run went.",
};

/**
 * A function `t(key, values)` that looks up `words`, then English, and fills in `{names}`.
 * An unknown key is a mistake in this pack and throws.
 */
export function translator(words = {}) {
  return (key, values = {}) => {
    const text = words[key] ?? ENGLISH[key];
    if (text === undefined) throw new Error(`no text for ${key}`);
    return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
  };
}

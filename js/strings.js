/**
 * The texts of the panel and of the line on nodes. English is here. Other languages come from
 * "wanVae" in locales/<language>/main.json, which ComfyUI serves.
 */
export const ENGLISH = {
  "line.idle": "No report yet: run the workflow",
  "line.running": "{done} of {total} frames",
  "line.left": "{time} left",
  "line.cancelled": "cancelled after {done} of {total} frames",
  "line.failed": "failed: {error}",
  "line.frames": "{total} frames",
  "line.one_frame": "1 frame",
  "line.rate": "{rate} frames/s",
  "line.accelerate": "ready: no node has used it yet",
  "line.unchanged": "as it came: no Wan VAE",
  "line.video": "ready: decoded when a node reads it",
  "line.cached": "from the cache: {what}",
  "line.cached_unknown": "from ComfyUI's cache: nothing is known of that run",
  "phase.planning": "preparing",
  "phase.compiling": "compiling kernels",
  "phase.starting_workers": "starting {count} workers",
  "phase.comfyui": "ComfyUI's own VAE works",
  "text.idle": "Run the workflow: the report appears here.",
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
  "section.result": "Result",
  "section.layout": "Memory layout",
  "section.layers": "Layers",
  "section.memory": "Memory",
  "section.shards": "Shards",
  "section.channels": "Latent by channel",
  "section.backends": "Kernels",
  "section.notes": "Notes",
  "result.size": "Size",
  "result.time": "Time",
  "result.rate": "Frames/s",
  "result.first": "First frames, each",
  "result.frame": "Time a frame",
  "result.encoder": "Video encoder",
  "result.fps": "Frames/s of the video",
  "result.strips": "Strips, one after another",
  "result.device": "Device",
  "result.dtype": "Computed in",
  "layout.reason": "Because",
  "layout.found": "Conv3d weights as loaded",
  "layout.used": "Conv3d weights as used",
  "layout.latent": "Latent",
  "layout.pixels": "Pixels",
  "layout.chosen": "Chosen",
  "layout.conversions": "Format conversions",
  "layout.mixed": "Calls with mixed formats (should be 0)",
  "layers.hint": "Each cell is one convolution. Use the arrow keys to move along the strip.",
  "layers.strip": "{count} convolutions by memory format",
  "chunks.summary": "{count} chunks: time a frame",
  "chunks.bar": "Chunk {number}: {frames} frames, {time} each",
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
  "channels.channel": "Channel",
  "channels.deviation": "Deviation",
  "channels.vae_deviation": "of this VAE",
  "channels.mean": "Mean",
  "channels.vae_mean": "of this VAE",
  "backends.off": "{op}: {backend} is off: {reason}",
  "switch.use": "Use {name}",
  "switch.back": "Use {name} again",
  "switch.title": "Use Wan VAE nodes in this workflow",
  "switch.none": "There is no VAE Decode or VAE Encode for a Wan VAE in this workflow.",
  "switch.accelerate":
    "Wan VAE Decode and Encode take the place of {nodes} nodes. {loaders} Load VAE nodes also lead to other nodes (image to video, VACE, …), which gain by Wan VAE, fast everywhere. Confirm puts it behind them too; Cancel leaves them as they are.",
  "setting.line": "Show the report line on nodes",
  "setting.line_tip": "A line at the bottom of each Wan VAE node that says how its last run went.",
};

/**
 * Makes a function `t(key, values)` that looks up a text in `words`, then in English, and fills in
 * `{names}`. An unknown key is a mistake in this pack and throws; `t.knows(key)` asks. `t.said(key,
 * values)` is a sentence of Python in the language of `words`, or null.
 */
export function translator(words = {}) {
  const fill = (text, values) =>
    text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
  const t = (key, values = {}) => {
    const text = words[key] ?? ENGLISH[key];
    if (text === undefined) throw new Error(`no text for ${key}`);
    return fill(text, values);
  };
  t.knows = (key) => (words[key] ?? ENGLISH[key]) !== undefined;
  // English is in Python's own words, so only other languages have texts for them.
  t.said = (key, values) => (words[`said.${key}`] ? fill(words[`said.${key}`], values) : null);
  return t;
}

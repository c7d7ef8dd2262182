/** Reports as text. Pure functions. Every value may be absent: a run can end before it is known. */

const DTYPES = { float32: "fp32", bfloat16: "bf16", float16: "fp16" };
const FAMILIES = { "wan2.1": "Wan 2.1", "wan2.2": "Wan 2.2" };
const BYTE_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
/** Memory formats as one short word: the order of dimensions in memory, the last the fastest. */
const LAYOUTS = { contiguous: "NCDHW", channels_last_3d: "NDHWC" };

/** "1.5 GiB"; an empty string for null. */
export function bytesText(bytes) {
  if (bytes === null || bytes === undefined) return "";
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < BYTE_UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${BYTE_UNITS[unit]}`;
}

/** "850 ms", "1.2 s", "2:05 min"; an empty string for null. */
export function durationText(ms) {
  if (ms === null || ms === undefined) return "";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${clockText(ms)} ${ms < 3_599_500 ? "min" : "h"}`;
}

/** "1:20", "0:05", "1:02:03"; an empty string for null. */
export function clockText(ms) {
  if (ms === null || ms === undefined) return "";
  const seconds = Math.round(ms / 1000);
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  const two = (number) => String(number).padStart(2, "0");
  const start = hours ? `${hours}:${two(minutes)}` : String(minutes);
  return `${start}:${two(seconds % 60)}`;
}

/** "67.5" of 67.49, "132" of 131.6; an empty string for null. */
export function rateText(rate) {
  if (rate === null || rate === undefined) return "";
  return rate >= 100 ? String(Math.round(rate)) : rate.toFixed(1);
}

/** "16", "29.97": of a video file; an empty string for null. */
export function fpsText(fps) {
  return fps ? String(Number(fps.toFixed(2))) : "";
}

/** "bf16" for "bfloat16". */
export function dtypeText(dtype) {
  return DTYPES[dtype] ?? dtype ?? "";
}

/** "1 × 16 × 21 × 60 × 104". */
export function shapeText(shape) {
  return (shape ?? []).join(" × ");
}

/** "1280×720" of pixels [B, 3, T, H, W]; an empty string for null. */
export function sizeText(shape) {
  return shape ? `${shape[4]}×${shape[3]}` : "";
}

/** The memory format of counted weights as one word: "NDHWC", "NCDHW", "mixed", or "" for none. */
export function layoutWord(counts) {
  const formats = Object.entries(counts ?? {}).filter(
    ([format, count]) => format !== "either" && count > 0,
  );
  if (formats.length === 0) return "";
  return (formats.length === 1 && LAYOUTS[formats[0][0]]) || "mixed";
}

/**
 * The detected layout: `{text, mixed}`, with the word for the weights as they came; null if nothing
 * is known. Mixed are those, or the formats that met in a convolution.
 */
export function layoutOf(report) {
  const text = layoutWord(report.layout?.weights_found);
  return text ? { text, mixed: isMixed(report) } : null;
}

function isMixed({ layout }) {
  const words = [layoutWord(layout?.weights_found), layoutWord(layout?.weights_used)];
  return layout?.mixed_calls > 0 || words.includes("mixed");
}

/** What a memory format is called: as in the text of Wan VAE Inspect and of the command line. */
export function formatText(format) {
  return format === "either" ? "layout-free" : format;
}

/** "55 channels_last_3d, 6 layout-free"; an empty string when nothing was counted. */
export function countsText(counts) {
  return Object.entries(counts ?? {})
    .filter(([, count]) => count > 0)
    .map(([format, count]) => `${count} ${formatText(format)}`)
    .join(", ");
}

/**
 * What a report means at a glance: "running", "good", "notice" (it worked, and there is something
 * to read: a fallback, a warning, a cancel, mixed formats) or "bad" (it failed).
 */
export function toneOf(report) {
  if (report.status === "running") return "running";
  if (report.status === "failed") return "bad";
  if (report.status === "cancelled" || isMixed(report)) return "notice";
  if (report.warnings?.length || report.fallbacks?.length) return "notice";
  return "good";
}

/** The sign of each tone, for people who cannot tell the colours apart. */
export const SIGNS = { running: "▸", good: "✓", notice: "!", bad: "✕" };

/** Makes `say(sentence)`: a sentence of Python in the language of `t`, if the report words it. */
export function sayer(report, t) {
  const say = (sentence) => {
    const worded = report.worded?.[sentence];
    if (!worded) return String(sentence);
    const values = Object.entries(worded.values).map(([name, value]) => [name, say(value)]);
    return t.said(worded.key, Object.fromEntries(values)) ?? String(sentence);
  };
  return say;
}

const LABEL_COLUMNS = 9;

/** How many columns `text` takes where all letters are as wide: those of Chinese take two. */
function columnsOf(text) {
  return [...text].reduce((sum, letter) => sum + (letter >= "\u2e80" ? 2 : 1), 0);
}

/** The rows of a report (of Wan VAE Inspect) as lines: a label, and what it says behind it. */
export function rowsText(report, t) {
  const say = sayer(report, t);
  return report.rows
    .map(([label, text]) => {
      const said = say(label);
      return `${said}${" ".repeat(Math.max(0, LABEL_COLUMNS - columnsOf(said)))} ${say(text)}`;
    })
    .join("\n");
}

/** "81 frames", "1 frame", or while it runs or was stopped "33 of 81 frames". */
function framesText(report, t) {
  const [done, total] = [report.done_frames ?? 0, report.total_frames ?? 0];
  if (report.status === "running") return t("line.running", { done, total });
  if (report.status === "cancelled") return t("line.cancelled", { done, total });
  return t(total === 1 ? "line.one_frame" : "line.frames", { total });
}

/**
 * What a run does before its first frames: "preparing", "starting 2 workers". The server may be newer
 * than an open page, and know phases that the page has no words for.
 */
function phaseText({ phase }, t) {
  const key = `phase.${phase.name}`;
  return t.knows(key) ? t(key, phase) : String(phase.name);
}

/** What a message says in a few words, the most wanted first: frames, time, frames/s, size, ... */
export function lineParts({ report, cached }, t) {
  const where = [report.device, dtypeText(report.dtype)];
  const size = sizeText(report.pixel_shape);
  let parts;
  if (report.status === "failed") parts = [t("line.failed", { error: sayer(report, t)(report.error ?? "") })];
  else if (report.phase) parts = [phaseText(report, t)];
  else if (report.operation === "accelerate") {
    const as = report.fallbacks?.length ? "line.unchanged" : "line.accelerate";
    parts = [t(as), ...where];
  } else if (report.operation === "video") parts = [t("line.video"), size, ...where];
  else if (report.operation === "inspect") parts = [FAMILIES[report.config?.family], ...where];
  else if (report.status === "done" && !report.total_frames) parts = where;
  else if (report.status === "running") {
    const left = clockText(report.left_ms);
    parts = [framesText(report, t), left && t("line.left", { time: left }), size, ...where];
  } else {
    const rate = rateText(report.frames_per_s);
    const speed = report.total_frames > 1 && rate && t("line.rate", { rate });
    parts = [framesText(report, t), durationText(report.duration_ms), speed, size, ...where];
  }
  parts = parts.filter(Boolean);
  if (!cached) return parts;
  if (parts.length === 0) return [t("line.cached_unknown")];
  return [t("line.cached", { what: parts[0] }), ...parts.slice(1)];
}

/** The parts of a line in one: "81 frames · 1.2 s · 67.5 frames/s · 1280×720 · cuda:0 · bf16". */
export function lineText(message, t) {
  return lineParts(message, t).join(" · ");
}

/** Milliseconds a frame of each chunk, in order. */
export function msPerFrame(chunks) {
  return (chunks ?? []).map(({ frames, duration_ms }) => duration_ms / Math.max(1, frames));
}

/** The middle one of numbers in order of size; undefined for none. */
export function median(numbers) {
  return [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)];
}

/**
 * Counts the layers by operation and format: [{op: "conv3d", format: "contiguous", count: 32}].
 * The counts of conv3d are the same as those in `report.layout.weights_used`.
 */
export function layerGroups(layers) {
  const groups = new Map();
  for (const { op, format } of layers ?? []) {
    const key = `${op} ${format}`;
    const group = groups.get(key) ?? { op, format, count: 0 };
    group.count += 1;
    groups.set(key, group);
  }
  return [...groups.values()];
}

/**
 * "decoder.conv1 · 384 × 16 × 3 × 3 × 3 · channels_last_3d · eager", and for a kernel also which
 * one and how many times faster than eager: "… · cuda wgmma winograd · 2.8×".
 */
export function layerText(layer) {
  const runs = [layer.backend, layer.kernel].filter(Boolean).join(" ");
  const gain = typeof layer.gain === "number" ? `${layer.gain.toFixed(1)}×` : "";
  return [layer.name, shapeText(layer.shape), formatText(layer.format), runs, gain]
    .filter(Boolean)
    .join(" · ");
}

/** The report as *Copy report* copies it: indented JSON, for an issue. */
export function reportText(report) {
  return JSON.stringify(report, null, 2);
}

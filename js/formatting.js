/** Reports as text. Pure functions. Every value may be absent: a run can end before it is known. */

const DTYPES = { float32: "fp32", bfloat16: "bf16", float16: "fp16" };
const BYTE_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

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

/** "850 ms", "1.2 s", "2 min 5 s"; an empty string for null. */
export function durationText(ms) {
  if (ms === null || ms === undefined) return "";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  const seconds = Math.round(ms / 1000);
  return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

/** "bf16" for "bfloat16". */
export function dtypeText(dtype) {
  return DTYPES[dtype] ?? dtype ?? "";
}

/** "1 × 16 × 21 × 60 × 104". */
export function shapeText(shape) {
  return (shape ?? []).join(" × ");
}

/**
 * Counts the weights that are in the chosen format, and all that have a format. The weights of
 * 1x1x1 convolutions ("either") have the same bytes in both formats and are left out.
 */
export function inChosenFormat(layout) {
  const counts = layout?.weights_used ?? {};
  let total = 0;
  for (const [format, count] of Object.entries(counts)) if (format !== "either") total += count;
  return { matching: counts[layout?.chosen] ?? 0, total };
}

/** "55 channels_last_3d, 6 either"; an empty string when nothing was counted. */
export function countsText(counts) {
  return Object.entries(counts ?? {})
    .filter(([, count]) => count > 0)
    .map(([format, count]) => `${count} ${format}`)
    .join(", ");
}

/**
 * What a report means at a glance: "running", "good", "notice" (it worked, and there is something
 * to read: a fallback, a warning, a cancel) or "bad" (it failed, or formats were mixed).
 */
export function toneOf(report) {
  if (report.status === "running") return "running";
  if (report.status === "failed") return "bad";
  const layout = report.layout ?? {};
  if (layout.mixed_calls > 0 || layout.weights_used?.other > 0) return "bad";
  if (report.status === "cancelled") return "notice";
  if (report.warnings?.length || report.fallbacks?.length) return "notice";
  return "good";
}

/** The sign of each tone, for people who cannot tell the colours apart. */
export const SIGNS = { running: "▸", good: "✓", notice: "!", bad: "✕" };

/**
 * The one line on the node, e.g. "channels_last_3d (55/56) · bf16 · cuda:0 · 81 frames in 1.2 s".
 * `t(key, values)` translates.
 */
export function lineText(report, t) {
  if (report.status === "failed") return t("line.failed", { error: report.error ?? "" });
  const parts = [];
  if (report.layout?.chosen) {
    const { matching, total } = inChosenFormat(report.layout);
    parts.push(`${report.layout.chosen} (${matching}/${total})`);
  }
  parts.push(dtypeText(report.dtype), report.device);
  const progress = { done: report.done_frames ?? 0, total: report.total_frames ?? 0 };
  if (report.status === "running") parts.unshift(t("line.running", progress));
  else if (report.status === "cancelled") parts.unshift(t("line.cancelled", progress));
  else if (report.operation === "accelerate") parts.push(t("line.accelerate"));
  else if (report.operation !== "inspect") {
    const key = report.total_frames === 1 ? "line.one_frame" : "line.done";
    parts.push(t(key, { ...progress, time: durationText(report.duration_ms) }));
  }
  return parts.filter(Boolean).join(" · ");
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
  return [layer.name, shapeText(layer.shape), layer.format, runs, gain]
    .filter(Boolean)
    .join(" · ");
}

/** The report as *Copy report* copies it: indented JSON, for an issue. */
export function reportText(report) {
  return JSON.stringify(report, null, 2);
}

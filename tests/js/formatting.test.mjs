import assert from "node:assert/strict";
import { test } from "node:test";

import * as f from "../../js/formatting.js";
import { translator } from "../../js/strings.js";

const t = translator();
const report = {
  operation: "decode",
  status: "done",
  error: null,
  device: "cuda:0",
  dtype: "bfloat16",
  layout: {
    chosen: "channels_last_3d",
    weights_used: { contiguous: 1, channels_last_3d: 55, either: 6, other: 0 },
    mixed_calls: 0,
  },
  warnings: [],
  fallbacks: [],
  done_frames: 81,
  total_frames: 81,
  duration_ms: 1234,
};

test("the line of a finished decode", () => {
  assert.equal(
    f.lineText(report, t),
    "channels_last_3d (55/56) · bf16 · cuda:0 · 81 frames in 1.2 s",
  );
  assert.match(f.lineText({ ...report, total_frames: 1 }, t), /1 frame in 1\.2 s$/);
});

test("the line of the other outcomes", () => {
  assert.match(f.lineText({ ...report, status: "running", done_frames: 33 }, t), /^33 of 81 frames · /);
  assert.match(f.lineText({ ...report, status: "cancelled", done_frames: 9 }, t), /^cancelled after 9 of 81/);
  assert.equal(f.lineText({ status: "failed", error: "no Wan VAE" }, t), "failed: no Wan VAE");
  assert.doesNotMatch(f.lineText({ ...report, operation: "inspect" }, t), /frame/);
});

test("the line of a VAE that nobody has used", () => {
  const made = { operation: "accelerate", status: "done", dtype: "float32", device: "cpu" };
  assert.equal(f.lineText(made, t), "fp32 · cpu · ready: no node has used it yet");
  assert.equal(f.toneOf({ ...made, warnings: [] }), "good");
  assert.equal(f.toneOf({ ...made, warnings: ["2 patches"] }), "notice");
});

test("a report that ended early has a line too", () => {
  assert.equal(f.lineText({ status: "cancelled" }, t), "cancelled after 0 of 0 frames");
});

test("tones by meaning", () => {
  const mixed = { ...report.layout, mixed_calls: 2 };
  const other = { ...report.layout, weights_used: { other: 1 } };
  assert.equal(f.toneOf(report), "good");
  assert.equal(f.toneOf({ ...report, status: "running" }), "running");
  assert.equal(f.toneOf({ ...report, fallbacks: ["chunks of 2: out of memory"] }), "notice");
  assert.equal(f.toneOf({ ...report, warnings: ["NaN"] }), "notice");
  assert.equal(f.toneOf({ ...report, status: "cancelled" }), "notice");
  assert.equal(f.toneOf({ ...report, status: "failed" }), "bad");
  assert.equal(f.toneOf({ ...report, layout: mixed }), "bad");
  assert.equal(f.toneOf({ ...report, layout: other }), "bad");
  for (const tone of ["running", "good", "notice", "bad"]) assert.ok(f.SIGNS[tone]);
});

test("bytes", () => {
  const cases = [[null, ""], [0, "0 B"], [1023, "1023 B"], [1024, "1.0 KiB"],
    [1536 * 1024 ** 2, "1.5 GiB"], [200 * 1024 ** 2, "200 MiB"]];
  for (const [bytes, text] of cases) assert.equal(f.bytesText(bytes), text);
});

test("durations", () => {
  const cases = [[null, ""], [1.25, "1.3 ms"], [850.4, "850 ms"], [1240, "1.2 s"],
    [125_000, "2 min 5 s"], [119_900, "2 min 0 s"]];
  for (const [ms, text] of cases) assert.equal(f.durationText(ms), text);
});

test("counts, shapes, layers, dtypes", () => {
  assert.equal(f.countsText(report.layout.weights_used), "1 contiguous, 55 channels_last_3d, 6 either");
  assert.equal(f.countsText(undefined), "");
  assert.equal(f.shapeText([1, 16, 3]), "1 × 16 × 3");
  assert.equal(f.shapeText(null), "");
  assert.deepEqual(f.inChosenFormat(report.layout), { matching: 55, total: 56 });
  assert.equal(
    f.layerText({ name: "decoder.conv1", shape: [8, 4], format: "either", backend: "eager" }),
    "decoder.conv1 · 8 × 4 · either · eager",
  );
  assert.equal(
    f.layerText({ name: "a", shape: [8], format: "either", backend: "cuda",
      kernel: "wgmma winograd", gain: 2.84 }),
    "a · 8 · either · cuda wgmma winograd · 2.8×",
  );
  const untimed = { name: "a", shape: [8], format: "either", backend: "eager", kernel: "", gain: null };
  assert.equal(f.layerText(untimed), "a · 8 · either · eager");
  assert.equal(f.dtypeText("float8_e4m3fn"), "float8_e4m3fn");
});

test("layers by operation and format", () => {
  const layer = (op, format) => ({ op, format });
  const layers = [layer("conv3d", "contiguous"), layer("conv2d", "contiguous"),
    layer("conv3d", "contiguous"), layer("conv3d", "either")];
  assert.deepEqual(f.layerGroups(layers), [
    { op: "conv3d", format: "contiguous", count: 2 },
    { op: "conv2d", format: "contiguous", count: 1 },
    { op: "conv3d", format: "either", count: 1 },
  ]);
  assert.deepEqual(f.layerGroups(undefined), []);
});

test("the copied report is the report", () => {
  assert.deepEqual(JSON.parse(f.reportText(report)), report);
});

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
  pixel_shape: [1, 3, 81, 720, 1280],
  layout: {
    chosen: "channels_last_3d",
    weights_found: { contiguous: 56, channels_last_3d: 0, either: 6, other: 0 },
    weights_used: { contiguous: 0, channels_last_3d: 56, either: 6, other: 0 },
    mixed_calls: 0,
  },
  warnings: [],
  fallbacks: [],
  done_frames: 81,
  total_frames: 81,
  duration_ms: 1234,
  frames_per_s: 65.64,
};
const line = (changes = {}, message = {}) =>
  f.lineText({ ...message, report: { ...report, ...changes } }, t);

test("the line of a finished decode", () => {
  assert.equal(line(), "81 frames · 1.2 s · 65.6 frames/s · 1280×720 · cuda:0 · bf16");
  assert.equal(line({ total_frames: 1 }), "1 frame · 1.2 s · 1280×720 · cuda:0 · bf16");
});

test("the line of the other outcomes", () => {
  const running = { status: "running", done_frames: 33 };
  assert.match(line({ ...running, left_ms: 80_400 }), /^33 of 81 frames · 1:20 left · 1280×720 · /);
  assert.match(line(running), /^33 of 81 frames · 1280×720 · /, "nothing is known of the rest");
  assert.match(line({ status: "cancelled", done_frames: 9 }), /^cancelled after 9 of 81/);
  assert.equal(line({ status: "failed", error: "no Wan VAE" }), "failed: no Wan VAE");
  const inspected = line({ operation: "inspect", config: { family: "wan2.1" } });
  assert.equal(inspected, "Wan 2.1 · cuda:0 · bf16");
});

test("the line of a node that makes a VAE or a video for others", () => {
  const made = (changes) => line({ total_frames: 0, ...changes });
  assert.match(made({ operation: "accelerate" }), /^ready: no node has used it yet · cuda:0/);
  const handed = { operation: "accelerate", fallbacks: ["the VAE goes on as it came"] };
  assert.match(made(handed), /^as it came: no Wan VAE · /);
  assert.equal(f.toneOf({ ...report, ...handed }), "notice");
  assert.equal(
    made({ operation: "video" }),
    "ready: decoded when a node reads it · 1280×720 · cuda:0 · bf16",
  );
});

test("the line before the first frames", () => {
  const phase = (name, more) => line({ status: "running", phase: { name, ...more } });
  assert.equal(phase("planning"), "preparing");
  assert.equal(phase("compiling"), "compiling kernels");
  assert.equal(phase("starting_workers", { count: 2 }), "starting 2 workers");
  assert.equal(phase("comfyui"), "ComfyUI's own VAE works");
  assert.equal(phase("of_next_year"), "of_next_year");
});

test("the line of a result from the cache says so, and what is known", () => {
  assert.match(line({}, { cached: true }), /^from the cache: 81 frames · 1\.2 s · /);
  const unknown = { cached: true, report: { operation: "decode", status: "done" } };
  assert.match(f.lineText(unknown, t), /^from ComfyUI's cache: nothing is known/);
});

test("the detected layout is one short word", () => {
  const layout = (found, used, mixed_calls = 0) =>
    f.layoutOf({ layout: { weights_found: found, weights_used: used, mixed_calls } });
  const [contiguous, last, mixed] = [{ contiguous: 5, either: 1 }, { channels_last_3d: 5 },
    { contiguous: 1, channels_last_3d: 4 }];
  assert.deepEqual(layout(contiguous, contiguous), { text: "NCDHW", mixed: false });
  assert.deepEqual(layout(last, last), { text: "NDHWC", mixed: false });
  assert.deepEqual(layout(contiguous, last), { text: "NCDHW", mixed: false });
  assert.deepEqual(layout(mixed, last), { text: "mixed", mixed: true });
  assert.deepEqual(layout(last, last, 2), { text: "NDHWC", mixed: true });
  assert.equal(layout({}, { either: 3 }), null);
  assert.equal(f.layoutOf({}), null);
});

test("a sentence of Python is said in the reader's language", () => {
  const chinese = translator({ "said.layout.cpu": "{device}:未测得增益", "said.gone": "没有了" });
  const worded = {
    "cpu: no gain": { key: "layout.cpu", values: { device: "it is gone" } },
    "it is gone": { key: "gone", values: {} },
    "new": { key: "unheard.of", values: {} },
  };
  const say = f.sayer({ worded }, chinese);
  assert.equal(say("cpu: no gain"), "没有了:未测得增益", "a value may be a sentence too");
  assert.equal(say("new"), "new", "without a text it stays as it is");
  assert.equal(say("other"), "other");
  assert.equal(f.sayer({ worded }, t)("cpu: no gain"), "cpu: no gain");
});

test("chunks of different length are compared by the frame", () => {
  const chunks = [{ frames: 1, duration_ms: 30 }, { frames: 4, duration_ms: 40 }];
  assert.deepEqual(f.msPerFrame(chunks), [30, 10]);
  assert.deepEqual(f.msPerFrame(undefined), []);
  assert.equal(f.median([9, 1, 5]), 5);
});

test("rates and time left", () => {
  assert.deepEqual([null, 3.21, 131.6].map(f.rateText), ["", "3.2", "132"]);
  assert.deepEqual([null, 4900, 80_000, 3_723_000].map(f.clockText), ["", "0:05", "1:20", "1:02:03"]);
});

test("the line of a VAE that nobody has used", () => {
  const made = { operation: "accelerate", status: "done", dtype: "float32", device: "cpu" };
  assert.equal(f.lineText({ report: made }, t), "ready: no node has used it yet · cpu · fp32");
  assert.equal(f.toneOf({ ...made, warnings: [] }), "good");
  assert.equal(f.toneOf({ ...made, warnings: ["2 patches"] }), "notice");
});

test("a report that ended early has a line too", () => {
  assert.equal(f.lineText({ report: { status: "cancelled", total_frames: 9 } }, t),
    "cancelled after 0 of 9 frames");
  assert.equal(f.lineText({ report: { status: "cancelled" } }, t), "cancelled after 0 of 0 frames");
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
  assert.equal(f.toneOf({ ...report, layout: mixed }), "notice");
  assert.equal(f.toneOf({ ...report, layout: other }), "notice");
  for (const tone of ["running", "good", "notice", "bad"]) assert.ok(f.SIGNS[tone]);
});

test("bytes", () => {
  const cases = [[null, ""], [0, "0 B"], [1023, "1023 B"], [1024, "1.0 KiB"],
    [1536 * 1024 ** 2, "1.5 GiB"], [200 * 1024 ** 2, "200 MiB"]];
  for (const [bytes, text] of cases) assert.equal(f.bytesText(bytes), text);
});

test("frame rates of files", () => {
  const cases = [[null, ""], [undefined, ""], [16, "16"], [30000 / 1001, "29.97"]];
  for (const [fps, text] of cases) assert.equal(f.fpsText(fps), text);
});

test("durations", () => {
  const cases = [[null, ""], [1.25, "1.3 ms"], [850.4, "850 ms"], [1240, "1.2 s"],
    [125_000, "2:05 min"], [119_900, "2:00 min"],
    [3_723_000, "1:02:03 h"]];
  for (const [ms, text] of cases) assert.equal(f.durationText(ms), text);
});

test("counts, shapes, layers, dtypes", () => {
  assert.equal(f.countsText(report.layout.weights_used), "56 channels_last_3d, 6 layout-free");
  assert.equal(f.countsText(undefined), "");
  assert.equal(f.shapeText([1, 16, 3]), "1 × 16 × 3");
  assert.equal(f.shapeText(null), "");
  assert.equal(
    f.layerText({ name: "decoder.conv1", shape: [8, 4], format: "either", backend: "eager" }),
    "decoder.conv1 · 8 × 4 · layout-free · eager",
  );
  assert.equal(
    f.layerText({ name: "a", shape: [8], format: "either", backend: "cuda",
      kernel: "wgmma winograd", gain: 2.84 }),
    "a · 8 · layout-free · cuda wgmma winograd · 2.8×",
  );
  const untimed = { name: "a", shape: [8], format: "either", backend: "eager", kernel: "", gain: null };
  assert.equal(f.layerText(untimed), "a · 8 · layout-free · eager");
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

test("the rows of an inspection in columns, in the language of the page", () => {
  const rows = [
    ["model", "wan2.1 VAE"],
    ["not used", "conv3d cuda: no GPU"],
  ];
  const inspected = {
    rows,
    worded: {
      "not used": { key: "row.off", values: {} },
      "conv3d cuda: no GPU": { key: "off", values: { op: "conv3d", backend: "cuda", why: "no GPU" } },
      "no GPU": { key: "no_gpu", values: {} },
    },
  };
  assert.equal(
    f.rowsText(inspected, t),
    "model     wan2.1 VAE\nnot used  conv3d cuda: no GPU",
  );
  const chinese = translator({
    "said.row.off": "未使用",
    "said.off": "{op} {backend}:{why}",
    "said.no_gpu": "没有 GPU",
  });
  // A Chinese letter takes two columns.
  assert.equal(f.rowsText(inspected, chinese), "model     wan2.1 VAE\n未使用    conv3d cuda:没有 GPU");
});

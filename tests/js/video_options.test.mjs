import assert from "node:assert/strict";
import { test } from "node:test";

import { adapted, isNested } from "../../js/video_options.js";

const BEFORE = [16, "video/WanVAE", "auto", "auto", 0];
const AFTER = [10, "temp", true];
const both = (flat, nested) => [
  [...BEFORE, ...flat, ...AFTER],
  [...BEFORE, ...nested, ...AFTER],
];

// Flat: format, codec, crf. Nested: format, codec, encoding, crf, colours; then the flat codec, crf.
const SAME = {
  "nothing chosen": both(["auto", "auto", 16], ["auto", "auto", "auto", 16]),
  "a codec": both(["mp4", "h264", 16], ["mp4", "h264", "auto", "auto", 16]),
  "a codec and crf": both(["mkv", "av1", 30], ["mkv", "av1", "re-encode", 30, "auto", "auto", 16]),
  "a codec that the container has not": both(["webm", "h264", 20], ["webm", "auto", "h264", 20]),
};

for (const [name, [flat, nested]] of Object.entries(SAME)) {
  test(`${name}: saved in one form, opened in the other`, () => {
    assert.deepEqual(adapted(flat, true), nested);
    assert.deepEqual(adapted(nested, false), flat);
  });
  test(`${name}: opened in the form in which it was saved`, () => {
    assert.equal(adapted(flat, false), flat);
    assert.equal(adapted(nested, true), nested);
  });
}

test("crf alone becomes the codec that auto stands for", () => {
  const of = (format) => adapted([...BEFORE, format, "auto", 20, ...AFTER], true).slice(5, -3);
  assert.deepEqual(of("auto"), ["auto", "h264", "re-encode", 20, "auto", "auto", 16]);
  assert.deepEqual(of("webm"), ["webm", "av1", "re-encode", 20, "auto", "auto", 16]);
});

test("values of before there were these options, and of pages that keep none", () => {
  for (const values of [BEFORE, [...BEFORE, "mp4"], undefined, { fps: 16 }]) {
    assert.equal(adapted(values, true), values);
    assert.equal(adapted(values, false), values);
  }
  // Of before there was crf.
  assert.deepEqual(adapted([...BEFORE, "mp4", "auto"], true), [...BEFORE, "mp4", "auto", "auto", 16]);
});

test("a definition says in which form its inputs are", () => {
  const of = (type) => ({ input: { optional: { format: [type, {}] } } });
  assert.equal(isNested(of("COMFY_DYNAMICCOMBO_V3")), true);
  assert.equal(isNested(of("COMBO")), false);
  assert.equal(isNested(of(["auto", "mp4"])), false);
  assert.equal(isNested({}), false);
});

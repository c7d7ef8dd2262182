/**
 * The widgets of Wan VAE Decode to Video in its two forms. Where ComfyUI's Save Video nests its
 * options, so does the node: a chosen codec brings a widget `encoding`, and re-encode brings crf and
 * color_space. Elsewhere format, codec and crf lie side by side. A saved workflow has values in the
 * order of its widgets and without their names, so those of one form are moved for the other.
 */

/** Widgets before `format`: fps, filename_prefix, memory_layout, precision, chunk_frames. */
const BEFORE = 5;
const CRF = 16;

/** Whether the inputs of a node's definition are nested. */
export function isNested(definition) {
  const type = definition.input?.optional?.format?.[0];
  return typeof type === "string" && type.startsWith("COMFY_DYNAMICCOMBO");
}

/**
 * `values` of a saved node in the form of this ComfyUI; `values` themselves if they have it.
 *
 * nests: whether that is the nested one.
 */
export function adapted(values, nests) {
  if (!Array.isArray(values) || values.length <= BEFORE + 1) return values;
  // Behind the codec stands crf, a number; in the nested form the encoding or a flat codec does.
  const wasNested = typeof values[BEFORE + 2] === "string";
  if (wasNested === nests) return values;
  const before = values.slice(0, BEFORE);
  return [...before, ...(nests ? nested : flat)(values.slice(BEFORE))];
}

/** From [format, codec, crf, ...]. What the nested widgets cannot say stays in the flat ones. */
function nested([format, codec, crf = CRF, ...rest]) {
  if (crf === CRF && codec === "auto") return [format, "auto", "auto", CRF, ...rest];
  const chosen = codec !== "auto" ? codec : format === "webm" ? "av1" : "h264";
  if (format === "webm" && chosen === "h264") return [format, "auto", chosen, crf, ...rest];
  const encoding = crf === CRF ? ["auto"] : ["re-encode", crf, "auto"];
  return [format, chosen, ...encoding, "auto", CRF, ...rest];
}

/** To [format, codec, crf, ...]. */
function flat([format, codec, ...rest]) {
  let crf = null;
  if (codec !== "auto" && rest.shift() === "re-encode") [crf] = rest.splice(0, 2);
  const [flatCodec, flatCrf, ...others] = rest;
  return [format, codec === "auto" ? flatCodec : codec, crf ?? flatCrf, ...others];
}

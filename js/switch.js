/**
 * Puts our nodes in the place of ComfyUI's own and back. `LiteGraph` is ComfyUI's; nothing here has
 * side effects when imported. Who calls makes one undo of it.
 */

/** What takes the place of a node of ComfyUI's. */
const OURS = {
  VAEDecode: "WanVAEDecode",
  VAEDecodeTiled: "WanVAEDecode",
  VAEEncode: "WanVAEEncode",
  VAEEncodeTiled: "WanVAEEncode",
};
/** What takes the place of a node of ours that was not switched before. */
const CORE = {
  WanVAEDecode: "VAEDecode",
  WanVAEDecodeSharded: "VAEDecode",
  WanVAEEncode: "VAEEncode",
};
const ACCELERATE = "WanVAEAccelerate";
/** The property in which a node remembers what it was, with its widgets. */
const BEFORE = "wan_vae_before";
// How LiteGraph names the ends of links at the border of a subgraph; a newer one in quotes.
const SUBGRAPH_INPUT = -10;
const SUBGRAPH_OUTPUT = -20;
/** Files of a Wan or Qwen-Image VAE, by the names under which they are published. */
const WAN_FILE = /wan|qwen/i;
const GAP = 60;

/** The type that can take the place of `node`, or null. */
export function counterpart(node) {
  const type = node.comfyClass ?? node.type;
  if (type in OURS) return OURS[type];
  return node.properties?.[BEFORE]?.type ?? CORE[type] ?? null;
}

/** True if `node` is one of ComfyUI's that ours can take the place of. */
export const isCore = (node) => (node.comfyClass ?? node.type) in OURS;

/** `graph` and every subgraph in it, each once. */
export function* graphsIn(graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  yield graph;
  for (const node of graph.nodes) yield* graphsIn(node.subgraph, seen);
}

/** The links of an output of `node`: objects that know their target. */
const linksOf = (node, slot) =>
  [...node.graph.links.values()].filter(
    (link) => link.origin_id === node.id && link.origin_slot === slot,
  );

/** Let what `link` came from lead to input `index` of `node`, through the same reroutes. */
function connectSource(graph, link, node, index) {
  if (Number(link.origin_id) === SUBGRAPH_INPUT) {
    graph.inputNode.slots[link.origin_slot].connect(node.inputs[index], node);
  } else {
    graph.getNodeById(link.origin_id).connect(link.origin_slot, node, index, link.parentId);
  }
}

/** Let output `index` of `node` lead to where `link` went. */
function connectTarget(graph, link, node, index) {
  if (Number(link.target_id) === SUBGRAPH_OUTPUT) {
    graph.outputNode.slots[link.target_slot].connect(node.outputs[index], node);
  } else {
    const target = graph.getNodeById(link.target_id);
    node.connect(index, target, link.target_slot, link.parentId);
  }
}

/**
 * Put a node of `type` in the place of `node` and return it. Links (with their reroutes), title,
 * place, colours and mode stay, and it lies in the same group and subgraph.
 */
export function replaceNode(LiteGraph, node, type) {
  const { graph } = node;
  const made = LiteGraph.createNode(type);
  if (!made) throw new Error(`ComfyUI knows no node ${type}`);
  const remembered = node.properties?.[BEFORE];
  // Before it is added: Nodes 2.0 keep a place of their own from then on.
  made.pos = [...node.pos];
  graph.add(made);
  if (node.title && node.title !== node.constructor.title) made.title = node.title;
  made.mode = node.mode;
  made.flags = { ...made.flags, ...node.flags };
  for (const name of ["color", "bgcolor", "boxcolor", "shape"]) {
    if (node[name] !== undefined) made[name] = node[name];
  }
  const values = remembered?.type === type ? remembered.values : {};
  for (const widget of made.widgets ?? []) {
    if (widget.name in values) widget.value = values[widget.name];
  }
  const saved = (node.widgets ?? []).filter((widget) => widget.serialize !== false);
  made.setProperty(BEFORE, {
    type: node.comfyClass ?? node.type,
    values: Object.fromEntries(saved.map((widget) => [widget.name, widget.value])),
  });
  made.setSize([Math.max(made.size[0], node.size[0]), made.size[1]]);

  (node.inputs ?? []).forEach((input, slot) => {
    const index = made.inputs.findIndex(({ name }) => name === input.name);
    const link = node.getInputLink(slot);
    if (link && index >= 0) connectSource(graph, link, made, index);
  });
  (node.outputs ?? []).forEach((_output, slot) => {
    for (const link of linksOf(node, slot)) connectTarget(graph, link, made, slot);
  });
  graph.remove(node);
  return made;
}

/** The node from which a VAE comes to `node`, through reroutes; null at a subgraph's border. */
function loaderOf(node) {
  let slot = (node.inputs ?? []).findIndex(({ name }) => name === "vae");
  for (;;) {
    const link = slot < 0 ? null : node.getInputLink(slot);
    const origin = link && node.graph.getNodeById(link.origin_id);
    if (!origin) return null;
    if (origin.type !== "Reroute") return origin;
    [node, slot] = [origin, 0];
  }
}

/** True unless the VAE of `node` visibly comes from a file of another model. */
function mayBeWan(node) {
  const loader = loaderOf(node);
  const names = (loader?.widgets ?? []).map(({ value }) => value);
  const files = names.filter((value) => /\.(safetensors|pth|pt|ckpt)$/i.test(String(value)));
  return files.length === 0 || files.some((file) => WAN_FILE.test(file));
}

/** The nodes of the workflow of which ours can take the place. */
export function replaceable(graph) {
  return [...graphsIn(graph)].flatMap((one) =>
    one.nodes.filter((node) => isCore(node) && mayBeWan(node)));
}

/** What `loader` gives its VAE to, except for nodes of ours, which need no other VAE. */
function othersOf(loader) {
  return linksOf(loader, 0).filter((link) => {
    const type = loader.graph.getNodeById(link.target_id)?.type ?? "";
    return !type.startsWith("WanVAE");
  });
}

/** The Load VAE nodes of a Wan file with a target that is not in `replaced`. */
export function loadersToAccelerate(graph, replaced = []) {
  const gone = new Set(replaced.map(({ id }) => id));
  return [...graphsIn(graph)].flatMap((one) =>
    one.nodes.filter((node) =>
      node.type === "VAELoader" &&
      WAN_FILE.test(node.widgets?.[0]?.value ?? "") &&
      othersOf(node).some((link) =>
        !gone.has(link.target_id) || Number(link.target_id) === SUBGRAPH_OUTPUT)));
}

/** Put WanVAEAccelerate behind `loader`, for all that it leads to but nodes of ours. */
export function accelerate(LiteGraph, loader) {
  const { graph } = loader;
  const others = othersOf(loader);
  const made = LiteGraph.createNode(ACCELERATE);
  made.pos = [loader.pos[0], loader.pos[1] + loader.size[1] + GAP];
  graph.add(made);
  for (const link of others) connectTarget(graph, link, made, 0);
  loader.connect(0, made, made.inputs.findIndex(({ name }) => name === "vae"));
  return made;
}

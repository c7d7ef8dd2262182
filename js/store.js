/**
 * The last report of every node, and an event when one changes.
 *
 * A message is what the server sends: `{node, workflow, kind, vae, cached, sent_s, report}`. `node`
 * is the execution id ("5", or "5:3" inside a subgraph) and `kind` the class of the node that ran,
 * one of ours or any other; `workflow` is the id of the workflow or null for API prompts. `vae` is
 * the execution id of the node of ours whose VAE or VIDEO another node used, else null. `cached`:
 * the result came from ComfyUI's cache, and the report (if anything is known) is of the run that
 * made it. `sent_s`: when the server made the message, in seconds.
 *
 *     const store = new ReportStore();
 *     store.addEventListener("change", (event) => console.log(event.detail.message));
 *     store.put({ node: "5", workflow: null, kind: "WanVAEDecode", vae: null, report });
 */
export class ReportStore extends EventTarget {
  #messages = new Map();

  /** Keep one message and tell listeners. A message without a report object is ignored. */
  put(message) {
    if (!isMessage(message)) return;
    this.#keep(message);
    this.#changed(message);
  }

  /**
   * Merge the reports that the server kept. Of two about the same node the later one stays. Fires
   * one event.
   */
  merge(messages) {
    for (const message of messages.filter(isMessage)) {
      const present = this.#messages.get(keyOf(message));
      if (!(present?.sent_s > message.sent_s)) this.#keep(message);
    }
    this.#changed(null);
  }

  /** Forget runs that nobody can finish: the server was started anew and does not know them. */
  dropRunning() {
    for (const [key, { report }] of this.#messages) {
      if (report.status === "running") this.#messages.delete(key);
    }
  }

  /** Tell listeners to look again: another workflow with other nodes may be on screen. */
  touch() {
    this.#changed(null);
  }

  /** All messages, the most recently changed last. */
  all() {
    return [...this.#messages.values()];
  }

  /** The most recent message for which `matches` is true, or undefined. */
  findLast(matches) {
    return this.all().findLast(matches);
  }

  #keep(message) {
    const key = keyOf(message);
    this.#messages.delete(key); // keeps the most recently changed message last
    this.#messages.set(key, message);
  }

  #changed(message) {
    this.dispatchEvent(new CustomEvent("change", { detail: { message } }));
  }
}

function keyOf({ node, workflow }) {
  return JSON.stringify([workflow ?? null, String(node)]);
}

function isMessage(message) {
  return message?.node != null && message.report !== null && typeof message.report === "object";
}

/**
 * Finds the node of `graph` with an execution id: "5", or "5:3" for node 3 in the subgraph of
 * node 5. Returns null if the graph has no such node.
 */
export function nodeByExecutionId(graph, executionId) {
  let node = null;
  for (const id of String(executionId).split(":")) {
    if (node !== null) graph = node.subgraph;
    node = graph?.getNodeById(id) ?? null;
    if (node === null) return null;
  }
  return node;
}

/**
 * The node of `graph` that a message is about, or null. Ids are used again in other workflows and
 * after edits, so the class must fit too.
 */
export function nodeOf(message, graph) {
  if (!graph || !fitsWorkflow(message, graph)) return null;
  const node = nodeByExecutionId(graph, message.node);
  return node && node.comfyClass === message.kind ? node : null;
}

/** Nodes that make what other nodes decode with; their line shows what these did. */
const MAKERS = ["WanVAEAccelerate", "WanVAECreateVideo"];

/** The node of `graph` whose VAE or VIDEO the node of a message used, or null. */
export function makerOf(message, graph) {
  if (!message.vae || nodeOf(message, graph) === null) return null;
  const node = nodeByExecutionId(graph, message.vae);
  return MAKERS.includes(node?.comfyClass) ? node : null;
}

/** True if a message belongs to the workflow on screen: never one of an API prompt, without an id. */
export function fitsWorkflow(message, graph) {
  return Boolean(message.workflow) && message.workflow === graph?.id;
}

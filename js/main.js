/** The only file with side effects: registers the elements, the extension and its listeners. */
import { api } from "/scripts/api.js";
import { app } from "/scripts/app.js";

import { sayer } from "./formatting.js";
import { WanVAELine, WanVAEText } from "./line.js";
import { WanVAEPanel } from "./panel.js";
import { showNode } from "./show.js";
import { makerOf, nodeOf, ReportStore } from "./store.js";
import { translator } from "./strings.js";
import {
  accelerate,
  counterpart,
  isCore,
  loadersToAccelerate,
  replaceable,
  replaceNode,
} from "./switch.js";
import { adapted, isNested } from "./video_options.js";

const EVENT = "wan_vae.report";
const REPORTS = "/wan_vae/reports";
const CACHED = "/wan_vae/cached";
const TAB = "wan-vae";
const LINE_SETTING = "WanVAE.NodeLine";
const USE = "WanVAE.UseInWorkflow";
const LINE_HEIGHT = 48;
const TEXT_HEIGHT = 160;
const MARGIN = 4;
const LEAST_WIDTH = 270; // of a new node: the line shows all of its first row
// The nodes that get a line. The panel has a card for every node that sends a report.
const NODES = /^WanVAE(Accelerate|CreateVideo|Decode|DecodeSharded|DecodeToVideo|Encode|Inspect)$/;

const store = new ReportStore();
let t = translator();
let panel = null;
const lineWidgets = new Set();

/** The graph of the whole workflow; undefined until the frontend has set it up. */
const rootGraph = () => app.graph;

// The server tells reports to the client that queued the prompt, and to no other.
const clientId = () => api.clientId ?? sessionStorage.getItem("clientId") ?? "";

async function ask(route, body = null) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const answer = await api.fetchApi(route, options ?? undefined);
  if (!answer.ok) throw new Error(`${route} answered ${answer.status}`);
  const { reports, notices, worded } = await answer.json();
  store.merge(reports);
  return (notices ?? []).map(sayer({ worded }, t));
}

const warn = (error) => console.warn("Wan VAE: no reports from the server:", error);
const refresh = () => ask(`${REPORTS}?client_id=${encodeURIComponent(clientId())}`).catch(warn);
const askOfCached = ({ nodes, prompt_id }) =>
  ask(CACHED, { client_id: clientId(), prompt_id, nodes }).catch(warn);

/** Load the texts in the language of the interface; English is the default. */
async function loadWords() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const answer = await api.fetchApi("/i18n");
  if (!answer.ok) return;
  const languages = await answer.json();
  t = translator(languages[locale]?.wanVae);
}

/** Open the panel, at the card of `node`. */
function openPanel(node) {
  const tabs = app.extensionManager.sidebarTab;
  if (tabs.activeSidebarTabId !== TAB) tabs.toggleSidebarTab(TAB);
  // The frontend makes the content of a tab when it draws next.
  const reveal = () => (panel?.isConnected ? panel.reveal(node) : requestAnimationFrame(reveal));
  reveal();
}

function showLine(widget, shown) {
  widget.hidden = !shown; // canvas: takes no room
  // Nodes 2.0: a hidden element takes no room either. `options.hidden` is read only once, when the
  // node is made, so a line that is hidden then could never be shown again.
  widget.element.hidden = !shown;
}

/** Add an element of ours to `node`: shown on it, saved nowhere, no input of it. */
function addElement(node, name, height, maximum) {
  const made = document.createElement(name);
  made.context = {
    store,
    t: (...words) => t(...words),
    find: () =>
      store.findLast((message) => {
        const graph = rootGraph();
        return nodeOf(message, graph) === node || makerOf(message, graph) === node;
      }),
    openPanel: () => openPanel(node),
  };
  made.context.t.said = (...words) => t.said(...words);
  made.context.t.knows = (key) => t.knows(key);
  const widget = node.addDOMWidget(name.replaceAll("-", "_"), name, made, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    margin: MARGIN,
    getMinHeight: () => height,
    getMaxHeight: () => maximum,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // the option is read when queued, this when saved
  return widget;
}

function addLine(node) {
  const widget = addElement(node, "wan-vae-line", LINE_HEIGHT, LINE_HEIGHT);
  lineWidgets.add(widget);
  showLine(widget, app.extensionManager?.setting?.get(LINE_SETTING) ?? true);
  const removed = node.onRemoved;
  node.onRemoved = function (...values) {
    lineWidgets.delete(widget);
    return removed?.apply(this, values);
  };
}

/** Names of files may hold %date:...% and %Node.widget%, which the page replaces for core's nodes. */
function replaceTokens(node) {
  const widget = node.widgets?.find(({ name }) => name === "filename_prefix");
  if (!widget) return;
  widget.serializeValue = () => {
    const replace = window.comfyAPI?.utils?.applyTextReplacements;
    return replace ? replace(app, widget.value) : widget.value;
  };
}

function addPanel() {
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-th-large",
    title: t("panel.title"),
    tooltip: t("panel.title"),
    type: "custom",
    render: (container) => {
      panel = document.createElement("wan-vae-panel");
      panel.context = {
        store,
        t,
        locate: (message) => {
          const node = nodeOf(message, rootGraph());
          if (node === null) return null;
          const show = () => showNode(app, node, container);
          return { node, title: `${node.title} #${message.node}`, show };
        },
      };
      container.replaceChildren(panel);
    },
    destroy: () => panel?.remove(),
  });
}

/** Do `change` to the graph, in a way that one undo takes back. */
function changed(change) {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  tracker?.beforeChange();
  try {
    change();
  } finally {
    tracker?.afterChange();
  }
  app.canvas.setDirty(true, true);
}

/** "Use Wan VAE Decode" in the menu of VAE Decode, and the way back in the menu of ours. */
function menuItems(node) {
  const type = counterpart(node);
  const made = type && window.LiteGraph.registered_node_types[type];
  if (!made) return [];
  const content = t(isCore(node) ? "switch.use" : "switch.back", { name: made.title ?? type });
  const callback = () => changed(() => replaceNode(window.LiteGraph, node, type));
  return [null, { content, callback }];
}

/** Put our nodes in the place of ComfyUI's in the whole workflow, as far as the user wants it. */
async function useInWorkflow() {
  const { dialog, toast } = app.extensionManager;
  const nodes = replaceable(rootGraph());
  const loaders = loadersToAccelerate(rootGraph(), nodes);
  if (nodes.length + loaders.length === 0) {
    toast.add({ severity: "info", summary: t("panel.title"), detail: t("switch.none"), life: 5000 });
    return;
  }
  const title = t("switch.title");
  const message = t("switch.accelerate", { nodes: nodes.length, loaders: loaders.length });
  const wanted = loaders.length > 0 && (await dialog.confirm({ title, message })) === true;
  changed(() => {
    for (const node of nodes) replaceNode(window.LiteGraph, node, counterpart(node));
    if (wanted) for (const loader of loaders) accelerate(window.LiteGraph, loader);
  });
}

customElements.define("wan-vae-line", WanVAELine);
customElements.define("wan-vae-text", WanVAEText);
customElements.define("wan-vae-panel", WanVAEPanel);

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./wan_vae.css", import.meta.url).href;
document.head.append(style);

app.registerExtension({
  name: "WanVAE",
  settings: [
    {
      id: LINE_SETTING,
      category: ["Wan VAE", "Nodes", "Line"],
      name: t("setting.line"),
      tooltip: t("setting.line_tip"),
      type: "boolean",
      defaultValue: true,
      onChange: (shown) => {
        for (const widget of lineWidgets) showLine(widget, shown);
        rootGraph()?.setDirtyCanvas?.(true, true);
      },
    },
  ],
  commands: [{ id: USE, label: t("switch.title"), icon: "pi pi-bolt", function: useInWorkflow }],
  menuCommands: [{ path: ["Edit"], commands: [USE] }],
  getNodeMenuItems: menuItems,
  async setup() {
    await loadWords();
    addPanel();
    const reported = new Set();
    api.addEventListener("execution_start", () => reported.clear());
    api.addEventListener(EVENT, ({ detail }) => {
      reported.add(detail.node);
      store.put(detail);
    });
    // A node whose result is in ComfyUI's cache does not run and sends no report.
    api.addEventListener("execution_cached", ({ detail }) => askOfCached(detail));
    // Nor does one whose result another node of the same prompt made just before.
    api.addEventListener("executed", ({ detail }) => {
      const node = String(detail?.display_node ?? detail?.node);
      if (!detail?.output?.wan_vae || reported.has(node)) return;
      askOfCached({ nodes: [node], prompt_id: detail.prompt_id });
    });
    api.addEventListener("reconnected", () => {
      store.dropRunning(); // the server may have been started anew
      return refresh();
    });
    // What the user of this server must know, such as a second copy of the pack.
    for (const detail of (await refresh()) ?? []) {
      app.extensionManager.toast?.add({ severity: "error", summary: t("panel.title"), detail });
    }
  },
  beforeRegisterNodeDef(nodeType, definition) {
    if (definition.name !== "WanVAEDecodeToVideo") return;
    const { configure } = nodeType.prototype;
    nodeType.prototype.configure = function (saved) {
      const values = adapted(saved.widgets_values, isNested(definition));
      return configure.call(this, values === saved.widgets_values ? saved : { ...saved, widgets_values: values });
    };
  },
  nodeCreated(node) {
    if (!NODES.test(node.comfyClass ?? "")) return;
    replaceTokens(node);
    // Nodes 2.0 of frontend 1.32.9 takes a file for an image where the node has no VIDEO input.
    if (node.comfyClass === "WanVAEDecodeToVideo") node.previewMediaType = "video";
    if (node.comfyClass === "WanVAEInspect") {
      addElement(node, "wan-vae-text", TEXT_HEIGHT, undefined);
    }
    addLine(node);
    // The frontend has sized the node before. Else it would grow when it is drawn, and once more
    // when a saved workflow is loaded.
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width, LEAST_WIDTH), Math.max(node.size[1], height)]);
  },
  afterConfigureGraph() {
    store.touch(); // another workflow may be on screen
  },
});

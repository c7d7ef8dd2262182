/** The only file with side effects: registers the elements, the extension and its listeners. */
import { api } from "/scripts/api.js";
import { app } from "/scripts/app.js";

import { WanVAELine } from "./line.js";
import { WanVAEPanel } from "./panel.js";
import { nodeOf, ReportStore, vaeNodeOf } from "./store.js";
import { translator } from "./strings.js";

const EVENT = "wan_vae.report";
const ROUTE = "/wan_vae/reports";
const TAB = "wan-vae";
const LINE_SETTING = "WanVAE.NodeLine";
const LINE_HEIGHT = 36;
const LINE_MARGIN = 4;
// The nodes that get a line. The panel has a card for every node that sends a report.
const NODES = /^WanVAE(Accelerate|CreateVideo|Decode|DecodeSharded|DecodeToVideo|Encode|Inspect)$/;

const store = new ReportStore();
let t = translator();
const lineWidgets = new Set();

const rootGraph = () => app.rootGraph ?? app.graph;

async function fetchReports() {
  const answer = await api.fetchApi(ROUTE);
  if (!answer.ok) throw new Error(`${ROUTE} answered ${answer.status}`);
  store.merge((await answer.json()).reports);
}

const refresh = () =>
  fetchReports().catch((error) => console.warn("Wan VAE: no reports from the server:", error));

/** Load the texts in the language of the interface; English is the default. */
async function loadWords() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const answer = await api.fetchApi("/i18n");
  if (!answer.ok) return;
  const languages = await answer.json();
  t = translator(languages[locale]?.wanVae);
}

function openPanel() {
  const tabs = app.extensionManager.sidebarTab;
  if (tabs.activeSidebarTabId !== TAB) tabs.toggleSidebarTab(TAB);
}

function showNode(node) {
  // A node in a subgraph is on another canvas.
  if (node.graph && app.canvas.graph !== node.graph) app.canvas.setGraph?.(node.graph);
  app.canvas.centerOnNode(node);
  app.canvas.selectNode?.(node, false);
}

function showLine(widget, shown) {
  widget.hidden = !shown; // canvas: takes no room
  // Nodes 2.0: a hidden element takes no room either. `options.hidden` is read only once, when the
  // node is made, so a line that is hidden then could never be shown again.
  widget.element.hidden = !shown;
}

function addLine(node) {
  const line = document.createElement("wan-vae-line");
  line.context = {
    store,
    t: (...words) => t(...words),
    find: () =>
      store.findLast((message) => {
        const graph = rootGraph();
        return nodeOf(message, graph) === node || vaeNodeOf(message, graph) === node;
      }),
    openPanel,
  };
  const widget = node.addDOMWidget("wan_vae_line", "wan_vae_line", line, {
    serialize: false,
    hideOnZoom: false,
    margin: LINE_MARGIN,
    getMinHeight: () => LINE_HEIGHT,
    getMaxHeight: () => LINE_HEIGHT,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // the option is read when queued, this when saved
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
  let panel = null;
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
          return { node, title: `${node.title} #${message.node}`, show: () => showNode(node) };
        },
      };
      container.replaceChildren(panel);
    },
    destroy: () => panel?.remove(),
  });
}

customElements.define("wan-vae-line", WanVAELine);
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
  async setup() {
    await loadWords();
    addPanel();
    api.addEventListener(EVENT, ({ detail }) => store.put(detail));
    // A cached run sends no report, and a page that reconnects has missed some.
    api.addEventListener("execution_cached", refresh);
    api.addEventListener("reconnected", refresh);
    await refresh();
  },
  nodeCreated(node) {
    if (!NODES.test(node.comfyClass ?? "")) return;
    replaceTokens(node);
    addLine(node);
  },
  afterConfigureGraph() {
    store.touch(); // another workflow may be on screen
  },
});

import { element } from "./dom.js";
import {
  bytesText,
  countsText,
  durationText,
  dtypeText,
  layerGroups,
  layerText,
  lineText,
  reportText,
  shapeText,
  SIGNS,
  toneOf,
} from "./formatting.js";

/**
 * `<wan-vae-panel>`: one card for each node of the workflow that has a report, the latest first.
 * Set `context` = {store, t, locate(message): {title, show()} | null} before it is connected.
 */
export class WanVAEPanel extends HTMLElement {
  context = null;
  #cards = new Map();
  #frame = 0;
  #schedule = () => {
    // Reports can come faster than the screen is drawn.
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#render();
    });
  };

  connectedCallback() {
    this.classList.add("wan-vae-panel");
    this.context.store.addEventListener("change", this.#schedule);
    this.#render();
  }

  disconnectedCallback() {
    this.context.store.removeEventListener("change", this.#schedule);
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
  }

  #render() {
    const { store, t, locate } = this.context;
    const shown = [];
    for (const message of store.all().reverse()) {
      const place = locate(message);
      if (place === null || shown.some(({ node }) => node === place.node)) continue;
      shown.push({ ...place, message });
    }
    if (shown.length === 0) {
      this.#cards.clear();
      this.replaceChildren(
        element(
          "div",
          { class: "wan-vae-empty" },
          element("h3", {}, t("panel.empty")),
          element("p", {}, t("panel.empty_hint")),
        ),
      );
      return;
    }
    const cards = shown.map((place, index) => {
      const card = this.#cards.get(place.node) ?? new ReportCard(t, index === 0);
      card.update(place);
      return [place.node, card];
    });
    this.#cards = new Map(cards);
    const elements = cards.map(([, card]) => card.root);
    // Moving an element takes the focus from it, so the order changes only if necessary.
    const present = [...this.children];
    if (present.length !== elements.length || elements.some((e, i) => e !== present[i])) {
      const focused = document.activeElement;
      this.replaceChildren(...elements);
      if (this.contains(focused)) focused.focus({ preventScroll: true });
    }
  }
}

/** One report. A section whose facts did not change keeps its elements, with focus and hover. */
class ReportCard {
  #t;
  #sections = new Map();
  #place = null;

  constructor(t, open) {
    this.#t = t;
    this.title = element("span", { class: "wan-vae-title" });
    this.status = element("span", { class: "wan-vae-status" });
    this.line = element("p", { class: "wan-vae-summary" });
    this.notice = element("span", { class: "wan-vae-copied", role: "status" });
    this.body = element("div", { class: "wan-vae-body" });
    const actions = element(
      "div",
      { class: "wan-vae-actions" },
      element("button", { type: "button", onclick: () => this.#copy() }, t("panel.copy")),
      element("button", { type: "button", onclick: () => this.#place.show() }, t("panel.show_node")),
      this.notice,
    );
    this.root = element(
      "details",
      { class: "wan-vae-card", open },
      element("summary", {}, this.title, this.status),
      this.line,
      this.body,
      actions,
    );
  }

  update(place) {
    this.#place = place;
    const { report } = place.message;
    const tone = toneOf(report);
    this.root.dataset.tone = tone;
    this.title.textContent = place.title;
    this.status.textContent = `${SIGNS[tone]} ${this.#t(`status.${report.status}`)}`;
    this.line.textContent = lineText(report, this.#t);
    const sections = [
      this.#section("notes", [report.status === "done" ? null : report.error, report.warnings,
        report.fallbacks], () => notes(report)),
      this.#section("layout", [report.layout, report.latent_shape, report.pixel_shape],
        () => layoutFacts(report, this.#t)),
      this.#section("layers", report.layers, () => layerStrip(report, this.#t)),
      this.#section("chunks", [report.chunks, report.strips], () => timeline(report, this.#t)),
      this.#section("memory", report.memory, () => memoryFacts(report, this.#t)),
      this.#section("shards", report.shards, () => shardTable(report, this.#t)),
      this.#section("backends", report.backends, () => backendFacts(report, this.#t)),
    ].filter((section) => section !== null);
    const present = [...this.body.children];
    if (present.length !== sections.length || sections.some((s, i) => s !== present[i])) {
      this.body.replaceChildren(...sections);
    }
  }

  /** The section `name`, rebuilt by `build` (null: nothing to show) if `facts` changed. */
  #section(name, facts, build) {
    const key = JSON.stringify(facts ?? null);
    const kept = this.#sections.get(name);
    if (kept?.key === key) return kept.section;
    const content = build();
    const section =
      content &&
      element(
        "section",
        { class: `wan-vae-${name}` },
        element("h4", {}, this.#t(`section.${name}`)),
        content,
      );
    this.#sections.set(name, { key, section });
    return section;
  }

  async #copy() {
    const text = reportText(this.#place.message.report);
    try {
      await navigator.clipboard.writeText(text);
      this.notice.textContent = this.#t("panel.copied");
    } catch (error) {
      // A page over plain http from another machine has no clipboard. Log the reason.
      console.warn("Wan VAE:", error);
      this.notice.textContent = this.#t("panel.copy_failed");
    }
  }
}

function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined);
  if (shown.length === 0) return null;
  return element(
    "dl",
    {},
    shown.map(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]),
  );
}

function notes(report) {
  const texts = [
    report.status === "done" ? null : report.error,
    ...(report.warnings ?? []),
    ...(report.fallbacks ?? []),
  ].filter(Boolean);
  if (texts.length === 0) return null;
  return element("ul", {}, texts.map((text) => element("li", {}, text)));
}

function layoutFacts(report, t) {
  const { layout } = report;
  if (!layout) return null;
  const chosen = [layout.chosen, layout.reason && `(${layout.reason})`].filter(Boolean).join(" ");
  const latent = [shapeText(report.latent_shape), layout.latent_format].filter(Boolean).join(", ");
  return facts([
    [t("layout.chosen"), chosen],
    [t("layout.found"), countsText(layout.weights_found)],
    [t("layout.used"), countsText(layout.weights_used)],
    [t("layout.latent"), report.latent_shape ? latent : ""],
    [t("layout.pixels"), shapeText(report.pixel_shape)],
    [t("layout.conversions"), report.operation === "inspect" ? "" : layout.conversions],
    [t("layout.mixed"), layout.mixed_calls > 0 ? layout.mixed_calls : ""],
  ]);
}

/** One cell for each convolution: a toolbar with one tab stop and arrow keys, details below. */
function layerStrip(report, t) {
  const layers = report.layers ?? [];
  if (layers.length === 0) return null;
  const readout = element("p", { class: "wan-vae-readout", role: "status" }, t("layers.hint"));
  const cells = layers.map((layer, index) =>
    element("button", {
      type: "button",
      class: "wan-vae-cell",
      "data-format": layer.format,
      "aria-label": layerText(layer),
      title: layerText(layer),
      tabindex: index === 0 ? 0 : -1,
    }),
  );
  const choose = (index) => {
    cells.forEach((cell, i) => cell.setAttribute("tabindex", i === index ? "0" : "-1"));
    readout.textContent = layerText(layers[index]);
  };
  const strip = element(
    "div",
    {
      class: "wan-vae-strip",
      role: "toolbar",
      "aria-label": t("layers.strip", { count: layers.length }),
      onkeydown: (event) => {
        const here = cells.indexOf(event.target);
        const moves = {
          ArrowRight: here + 1,
          ArrowLeft: here - 1,
          Home: 0,
          End: cells.length - 1,
        };
        const next = moves[event.key];
        if (next === undefined) return;
        // The canvas uses the same keys to pan and to move nodes.
        event.preventDefault();
        event.stopPropagation();
        cells[next]?.focus();
      },
      onfocusin: (event) => choose(cells.indexOf(event.target)),
      onpointerover: (event) => {
        const index = cells.indexOf(event.target);
        if (index >= 0) readout.textContent = layerText(layers[index]);
      },
    },
    cells,
  );
  const legend = element(
    "p",
    { class: "wan-vae-legend" },
    layerGroups(layers).map(({ op, format, count }) =>
      element(
        "span",
        {},
        element("i", { class: "wan-vae-cell", "data-format": format, "aria-hidden": "true" }),
        `${count} ${op} ${format}`,
      ),
    ),
  );
  return element("div", {}, strip, legend, readout);
}

function timeline(report, t) {
  const chunks = report.chunks ?? [];
  if (chunks.length === 0) return null;
  const times = chunks.map((chunk) => chunk.duration_ms);
  const later = times.slice(1).sort((a, b) => a - b);
  const summary =
    chunks.length === 1
      ? t("chunks.one", { first: durationText(times[0]) })
      : t("chunks.summary", {
          count: chunks.length,
          first: durationText(times[0]),
          median: durationText(later[Math.floor(later.length / 2)]),
        });
  const longest = Math.max(...times, 1e-6);
  const bars = chunks.map((chunk, index) => {
    const label = t("chunks.bar", {
      number: index + 1,
      frames: chunk.frames,
      time: durationText(chunk.duration_ms),
    });
    const bar = element("span", { class: "wan-vae-bar", title: label });
    bar.style.height = `${Math.max(6, (100 * chunk.duration_ms) / longest)}%`;
    return bar;
  });
  const strips = report.strips > 1 ? `, ${t("chunks.strips", { count: report.strips })}` : "";
  return element(
    "div",
    {},
    element("div", { class: "wan-vae-timeline", role: "img", "aria-label": summary }, bars),
    element("p", {}, summary + strips),
  );
}

function memoryFacts({ memory }, t) {
  if (!memory) return null;
  const sizes = ["weights", "planned", "peak", "output", "free"];
  return facts(sizes.map((name) => [t(`memory.${name}`), bytesText(memory[`${name}_bytes`])]));
}

function shardTable(report, t) {
  const shards = report.shards ?? [];
  if (shards.length === 0) return null;
  const heads = ["rank", "device", "rows", "halo", "wait"];
  const cell = (text) => element("td", {}, String(text));
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, heads.map((name) =>
      element("th", { scope: "col" }, t(`shards.${name}`))))),
    element("tbody", {}, shards.map((shard) =>
      element(
        "tr",
        {},
        cell(shard.rank),
        cell(shard.device),
        cell(`${shard.axis} ${shard.start_row}–${shard.stop_row}`),
        cell(`${shard.halo_rows} (${bytesText(shard.halo_bytes)})`),
        cell(durationText(shard.wait_ms)),
      ))),
  );
}

function backendFacts(report, t) {
  const { used = {}, off = [] } = report.backends ?? {};
  const list = facts([
    ...Object.entries(used),
    ...(Object.keys(used).length ? [["dtype", dtypeText(report.dtype)]] : []),
  ]);
  const reasons = off.map((entry) => element("li", {}, t("backends.off", entry)));
  if (!list && reasons.length === 0) return null;
  return element("div", {}, list, reasons.length ? element("ul", {}, reasons) : null);
}

import { element } from "./dom.js";
import {
  bytesText,
  countsText,
  durationText,
  dtypeText,
  formatText,
  fpsText,
  layerGroups,
  layerText,
  layoutOf,
  lineText,
  median,
  msPerFrame,
  rateText,
  reportText,
  sayer,
  shapeText,
  SIGNS,
  sizeText,
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

  /** Open the card of `node`, scroll to it and give it the focus; the others stay as they are. */
  reveal(node) {
    this.#render();
    const root = this.#cards.get(node)?.root;
    if (!root) return;
    root.open = true;
    root.scrollIntoView({ block: "start" });
    root.querySelector("summary").focus({ preventScroll: true });
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
    // What failed stands once, among the notes.
    this.line.textContent = report.status === "failed" ? "" : lineText(place.message, this.#t);
    this.line.hidden = !this.line.textContent;
    const t = this.#t;
    const sections = [
      this.#section("notes", [report.status, report.error, report.warnings, report.fallbacks],
        () => notes(report, t)),
      this.#section("result", [report.pixel_shape, report.done_frames, report.duration_ms,
        report.chunks, report.strips, report.video?.encoder], () => resultFacts(report, t)),
      this.#section("memory", report.memory, () => memoryFacts(report, t)),
      this.#section("layout", [report.layout, report.latent_shape, report.pixel_shape],
        () => layoutFacts(report, t)),
      this.#section("shards", report.shards, () => shardTable(report, t)),
      this.#folded("channels", report.latent_channels, () => channelTable(report, t)),
      this.#folded("backends", report.backends, () => backendFacts(report, t)),
      this.#folded("layers", report.layers, () => layerStrip(report, t)),
    ].filter((section) => section !== null);
    const present = [...this.body.children];
    if (present.length !== sections.length || sections.some((s, i) => s !== present[i])) {
      this.body.replaceChildren(...sections);
    }
  }

  /** The section `name`, rebuilt by `build` (null: nothing to show) if `facts` changed. */
  #section(name, facts, build, wrap = (title, content) => [element("h4", {}, title), content]) {
    const key = JSON.stringify(facts ?? null);
    const kept = this.#sections.get(name);
    if (kept?.key === key) return kept.section;
    const content = build();
    const title = this.#t(`section.${name}`);
    const section =
      content &&
      element("section", { class: `wan-vae-${name}` }, wrap(title, content, kept?.section));
    this.#sections.set(name, { key, section });
    return section;
  }

  /** As `#section`, but the reader unfolds it. It stays unfolded when it is built anew. */
  #folded(name, facts, build) {
    return this.#section(name, facts, build, (title, content, before) =>
      element(
        "details",
        { class: "wan-vae-folded", open: before?.querySelector("details")?.open ?? false },
        element("summary", {}, title),
        content,
      ));
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

function notes(report, t) {
  const say = sayer(report, t);
  const texts = [
    report.status === "failed" ? report.error : null,
    ...(report.warnings ?? []),
    ...(report.fallbacks ?? []),
  ].filter(Boolean);
  // Python may say the same of several clips, or as an error and as a fallback.
  const once = [...new Set(texts.map(say))];
  if (once.length === 0) return null;
  return element("ul", {}, once.map((text) => element("li", {}, text)));
}

function resultFacts(report, t) {
  const [first, ...others] = msPerFrame(report.chunks);
  const ended = report.status !== "running";
  const list = facts([
    [t("result.size"), sizeText(report.pixel_shape)],
    [t("result.time"), report.total_frames && ended ? durationText(report.duration_ms) : ""],
    [t("result.rate"), report.total_frames > 1 && ended ? rateText(report.frames_per_s) : ""],
    [t("result.first"), others.length ? durationText(first) : ""],
    [t("result.frame"), durationText(others.length ? median(others) : first)],
    [t("result.encoder"), report.video?.encoder],
    [t("result.fps"), fpsText(report.video?.fps)],
    [t("result.strips"), report.strips > 1 ? report.strips : ""],
    [t("result.device"), report.device_name || report.device],
    [t("result.dtype"), dtypeText(report.dtype)],
  ]);
  const bars = timeline(report, t);
  return list || bars ? element("div", {}, list, bars) : null;
}

function layoutFacts(report, t) {
  const { layout } = report;
  if (!layout?.chosen) return null;
  const word = layoutOf(report);
  const latent = [shapeText(report.latent_shape), layout.latent_format].filter(Boolean).join(", ");
  const list = facts([
    [t("layout.found"), countsText(layout.weights_found)],
    [t("layout.chosen"), layout.chosen],
    [t("layout.reason"), layout.reason && sayer(report, t)(layout.reason)],
    [t("layout.used"), countsText(layout.weights_used)],
    [t("layout.latent"), report.latent_shape ? latent : ""],
    [t("layout.pixels"), shapeText(report.pixel_shape)],
    [t("layout.conversions"), report.operation === "inspect" ? "" : layout.conversions],
    [t("layout.mixed"), layout.mixed_calls > 0 ? layout.mixed_calls : ""],
  ]);
  const chip =
    word && element("span", { class: "wan-vae-chip", "data-mixed": word.mixed }, word.text);
  return element("div", {}, chip, list);
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
        `${count} ${op} ${formatText(format)}`,
      ),
    ),
  );
  return element("div", {}, strip, legend, readout);
}

/** A bar for each chunk, as high as a frame of it took. Chunks may have different lengths. */
function timeline(report, t) {
  const chunks = report.chunks ?? [];
  if (chunks.length < 2) return null;
  const times = msPerFrame(chunks);
  const longest = Math.max(...times, 1e-6);
  const bars = chunks.map((chunk, index) => {
    const label = t("chunks.bar", {
      number: index + 1,
      frames: chunk.frames,
      time: durationText(times[index]),
    });
    const bar = element("span", { class: "wan-vae-bar", title: label });
    bar.style.height = `${Math.max(6, (100 * times[index]) / longest)}%`;
    return bar;
  });
  const summary = t("chunks.summary", { count: chunks.length });
  return element(
    "div",
    { class: "wan-vae-chunks" },
    element("div", { class: "wan-vae-timeline", role: "img", "aria-label": summary }, bars),
    element("p", {}, summary),
  );
}

function memoryFacts({ memory }, t) {
  if (!memory) return null;
  const sizes = ["weights", "planned", "peak", "output", "free"];
  return facts(sizes.map((name) => [t(`memory.${name}`), bytesText(memory[`${name}_bytes`])]));
}

/** Of a latent that looks like the other kind: each channel beside what the VAE makes. */
function channelTable(report, t) {
  const channels = report.latent_channels ?? [];
  if (channels.length === 0) return null;
  const names = ["deviation", "vae_deviation", "mean", "vae_mean"];
  const rows = channels.map((channel, index) => [
    index,
    ...names.map((name) => channel[name].toFixed(2)),
  ]);
  return tableOf([t("channels.channel"), ...names.map((name) => t(`channels.${name}`))], rows);
}

function shardTable(report, t) {
  const shards = report.shards ?? [];
  if (shards.length === 0) return null;
  const heads = ["rank", "device", "rows", "halo", "wait"].map((name) => t(`shards.${name}`));
  const rows = shards.map((shard) => [
    shard.rank,
    shard.device,
    `${shard.axis} ${shard.start_row}–${shard.stop_row}`,
    `${shard.halo_rows} (${bytesText(shard.halo_bytes)})`,
    durationText(shard.wait_ms),
  ]);
  return tableOf(heads, rows);
}

function tableOf(heads, rows) {
  const cell = (text) => element("td", {}, String(text));
  const table = element(
    "table",
    {},
    element("thead", {}, element("tr", {}, heads.map((text) =>
      element("th", { scope: "col" }, text)))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell)))),
  );
  return element("div", { class: "wan-vae-scrolled" }, table);
}

function backendFacts(report, t) {
  const { used = {}, off = [] } = report.backends ?? {};
  const list = facts([
    ...Object.entries(used),
    ...(Object.keys(used).length ? [["dtype", dtypeText(report.dtype)]] : []),
  ]);
  // Where one reason holds for all (no GPU), it stands once.
  const groups = new Map();
  for (const { op, backend, reason } of off) {
    const names = groups.get(reason) ?? { op: new Set(), backend: new Set() };
    groups.set(reason, { op: names.op.add(op), backend: names.backend.add(backend) });
  }
  const [say, joined] = [sayer(report, t), (names) => [...names].join(", ")];
  const reasons = [...groups].map(([reason, { op, backend }]) =>
    element("li", {}, t("backends.off", {
      op: joined(op),
      backend: joined(backend),
      reason: say(reason),
    })));
  if (!list && reasons.length === 0) return null;
  return element("div", {}, list, reasons.length ? element("ul", {}, reasons) : null);
}

import { element } from "./dom.js";
import { layoutOf, lineParts, rowsText, SIGNS, toneOf } from "./formatting.js";

/**
 * `<wan-vae-line>`: the last report of one node in two rows. It is a button that opens the panel.
 * Set `context` = {store, find(): message | undefined, t, openPanel()} before it is connected.
 */
export class WanVAELine extends HTMLElement {
  context = null;
  #update = () => this.update();

  connectedCallback() {
    if (!this.firstChild) {
      this.sign = element("span", { class: "wan-vae-sign", "aria-hidden": "true" });
      this.text = element("span", { class: "wan-vae-text" });
      this.progress = element("span", { class: "wan-vae-progress", "aria-hidden": "true" });
      const open = element(
        "button",
        { type: "button", class: "wan-vae-line", onclick: () => this.context.openPanel() },
        this.progress,
        this.sign,
        this.text,
      );
      this.append(open);
      this.button = open;
    }
    this.context.store.addEventListener("change", this.#update);
    this.update();
  }

  disconnectedCallback() {
    this.context.store.removeEventListener("change", this.#update);
  }

  update() {
    const { find, t } = this.context;
    const message = find();
    const report = message?.report;
    const tone = report ? toneOf(report) : "idle";
    const parts = report ? lineParts(message, t) : [t("line.idle")];
    const layout = report && layoutOf(report);
    this.dataset.tone = tone;
    this.sign.textContent = SIGNS[tone] ?? "";
    const words = parts.map((part, index) => [
      index ? " · " : "",
      // A number stays with its unit; a sentence is broken where it must.
      element("span", { class: report?.status === "failed" ? "" : "wan-vae-part" }, part),
    ]);
    const chip =
      layout &&
      element("span", { class: "wan-vae-chip", "data-mixed": layout.mixed }, layout.text);
    this.text.replaceChildren(...words.flat(), ...(chip ? [" · ", chip] : []));
    this.button.title = `${[...parts, layout?.text].filter(Boolean).join(" · ")}\n${t("line.open")}`;
    const share = report?.status === "running" ? report.done_frames / report.total_frames : 0;
    this.progress.style.width = `${Math.round(100 * (share || 0))}%`;
  }
}

/** `<wan-vae-text>`: the text of a node's last report (of Wan VAE Inspect). `context` as above. */
export class WanVAEText extends HTMLElement {
  context = null;
  #update = () => this.update();

  connectedCallback() {
    this.context.store.addEventListener("change", this.#update);
    this.update();
  }

  disconnectedCallback() {
    this.context.store.removeEventListener("change", this.#update);
  }

  update() {
    const { find, t } = this.context;
    this.tabIndex = 0;
    const report = find()?.report;
    this.textContent = report?.rows ? rowsText(report, t) : t("text.idle");
  }
}

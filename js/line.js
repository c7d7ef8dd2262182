import { element } from "./dom.js";
import { lineText, SIGNS, toneOf } from "./formatting.js";

/**
 * `<wan-vae-line>`: the last report of one node in one line. It is a button that opens the panel.
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
    const report = find()?.report;
    const tone = report ? toneOf(report) : "idle";
    const text = report ? lineText(report, t) : t("line.idle");
    this.dataset.tone = tone;
    this.sign.textContent = SIGNS[tone] ?? "";
    this.text.textContent = text;
    this.button.title = `${text}\n${t("line.open")}`;
    const share = report?.status === "running" ? report.done_frames / report.total_frames : 0;
    this.progress.style.width = `${Math.round(100 * (share || 0))}%`;
  }
}

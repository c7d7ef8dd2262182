import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import { test } from "node:test";

import { ENGLISH, translator } from "../../js/strings.js";

const root = new URL("../../", import.meta.url);
const read = (path) => readFile(new URL(path, root), "utf8");
const locale = async (language, file) => JSON.parse(await read(`locales/${language}/${file}.json`));
const names = (text) => [...text.matchAll(/\{(\w+)\}/g)].map((match) => match[1]).sort();

test("the English locale file says what the panel says by itself", async () => {
  assert.deepEqual((await locale("en", "main")).wanVae, ENGLISH);
});

test("every Chinese text exists and takes the same values", async () => {
  const chinese = (await locale("zh", "main")).wanVae;
  const own = Object.keys(chinese).filter((key) => !key.startsWith("said."));
  assert.deepEqual(own.sort(), Object.keys(ENGLISH).sort());
  for (const [key, text] of Object.entries(ENGLISH)) assert.deepEqual(names(chinese[key]), names(text), key);
});

test("both languages name the same nodes and inputs", async () => {
  const shape = (value) =>
    typeof value === "object"
      ? Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, shape(inner)]))
      : true;
  const [english, chinese] = await Promise.all(["en", "zh"].map((l) => locale(l, "nodeDefs")));
  assert.deepEqual(shape(chinese), shape(english));
  for (const node of Object.keys(english)) {
    const rows = (text) => text.split("\n").filter((line) => line.startsWith("|")).length;
    const [page, chinese] = [await read(`js/docs/${node}.md`), await read(`js/docs/${node}/zh.md`)];
    assert.equal(rows(chinese), rows(page), `${node}: as many inputs in both`);
  }
});

test("words fall back to English, values are filled in, unknown keys throw", () => {
  const t = translator({ "panel.copy": "Kopieren" });
  assert.equal(t("panel.copy"), "Kopieren");
  assert.equal(t("line.left", { time: "1:20" }), "1:20 left");
  assert.throws(() => t("panel.nonsense"), /panel\.nonsense/);
});

test("every key that a module asks for exists", async () => {
  for (const file of (await readdir(new URL("js/", root))).filter((name) => name.endsWith(".js"))) {
    for (const [, key] of (await read(`js/${file}`)).matchAll(/\bt\("([\w.]+)"/g)) {
      assert.ok(key in ENGLISH, `${file}: ${key}`);
    }
  }
});

test("no module writes markup from strings, polls, or patches the api", async () => {
  for (const file of (await readdir(new URL("js/", root))).filter((name) => name.endsWith(".js"))) {
    const source = await read(`js/${file}`);
    assert.doesNotMatch(source, /innerHTML|outerHTML|insertAdjacentHTML|setInterval/, file);
    assert.doesNotMatch(source, /\bapi\.\w+\s*=[^=]/, file);
  }
});

test("only main.js imports from ComfyUI or has side effects", async () => {
  for (const file of (await readdir(new URL("js/", root))).filter((name) => name.endsWith(".js"))) {
    if (file === "main.js") continue;
    const source = await read(`js/${file}`);
    assert.doesNotMatch(source, /\/scripts\/|customElements\.define|registerExtension/, file);
  }
});

import assert from "node:assert/strict";
import { test } from "node:test";

import { fitsWorkflow, makerOf, nodeByExecutionId, nodeOf, ReportStore } from "../../js/store.js";

const message = (node, status = "done", workflow = null) => ({
  node,
  workflow,
  report: { status },
});

function listened(store) {
  const events = [];
  store.addEventListener("change", (event) => events.push(event.detail.message));
  return events;
}

test("the last report of a node wins, and becomes the most recent", () => {
  const store = new ReportStore();
  store.put(message("1", "running"));
  store.put(message("2"));
  store.put(message("1", "done"));
  assert.deepEqual(
    store.all().map(({ node, report }) => [node, report.status]),
    [["2", "done"], ["1", "done"]],
  );
});

test("the same node of two workflows is two nodes", () => {
  const store = new ReportStore();
  store.put(message("1", "done", "a"));
  store.put(message("1", "failed", "b"));
  assert.equal(store.all().length, 2);
  assert.equal(store.findLast((m) => m.workflow === "a").report.status, "done");
});

test("each put is heard, and what is no report is not", () => {
  const store = new ReportStore();
  const events = listened(store);
  for (const bad of [null, undefined, {}, { node: "1" }, { node: "1", report: "x" }]) store.put(bad);
  assert.equal(events.length, 0);
  store.put(message("5:3"));
  assert.deepEqual(events.map((m) => m.node), ["5:3"]);
});

test("merging keeps the later one of two, and is heard once", () => {
  const store = new ReportStore();
  const at = (sent_s, ...about) => ({ ...message(...about), sent_s });
  store.put(at(7, "1", "running"));
  store.put(at(5, "2", "failed"));
  const events = listened(store);
  store.merge([at(6, "1", "done"), at(6, "2", "done"), at(6, "3", "done"), null]);
  const statuses = Object.fromEntries(store.all().map((m) => [m.node, m.report.status]));
  assert.deepEqual(statuses, { 1: "running", 2: "done", 3: "done" });
  assert.deepEqual(events, [null]);
});

test("runs that the server lost do not run for ever", () => {
  const store = new ReportStore();
  store.put(message("1", "running"));
  store.put(message("2", "done"));
  store.dropRunning();
  assert.deepEqual(store.all().map((m) => m.node), ["2"]);
});

test("a listener that leaves hears nothing more", () => {
  const store = new ReportStore();
  let heard = 0;
  const listener = () => (heard += 1);
  store.addEventListener("change", listener);
  store.put(message("1"));
  store.removeEventListener("change", listener);
  store.put(message("1"));
  assert.equal(heard, 1);
});

test("an execution id walks into subgraphs", () => {
  const graphOf = (nodes) => ({ getNodeById: (id) => nodes[id] });
  const inner = { title: "inner" };
  const outer = { title: "outer", subgraph: graphOf({ 3: inner }) };
  const graph = graphOf({ 5: outer, 6: {} });
  assert.equal(nodeByExecutionId(graph, "5"), outer);
  assert.equal(nodeByExecutionId(graph, "5:3"), inner);
  assert.equal(nodeByExecutionId(graph, "5:4"), null);
  assert.equal(nodeByExecutionId(graph, "6:3"), null);
  assert.equal(nodeByExecutionId(graph, "7"), null);
});

test("a message finds its node by id and class", () => {
  const graphOf = (nodes, id) => ({ id, getNodeById: (number) => nodes[number] ?? null });
  const inner = { comfyClass: "WanVaceToVideo" };
  const vae = { comfyClass: "WanVAEAccelerate" };
  const other = { comfyClass: "KSampler" };
  const graph = graphOf({ 2: vae, 3: other, 5: { subgraph: graphOf({ 3: inner }) } }, "a");
  const said = { node: "5:3", workflow: "a", kind: "WanVaceToVideo", vae: "2", report: {} };
  assert.equal(nodeOf(said, graph), inner);
  assert.equal(nodeOf({ ...said, kind: "KSampler" }, graph), null);
  assert.equal(nodeOf({ ...said, node: "3" }, graph), null, "the id of another node");
  assert.equal(nodeOf({ ...said, kind: null }, graph), null);
  assert.equal(nodeOf({ ...said, workflow: "b" }, graph), null);
  assert.equal(nodeOf(said, null), null);
  assert.equal(makerOf(said, graph), vae);
  assert.equal(makerOf({ ...said, vae: null }, graph), null);
  assert.equal(makerOf({ ...said, vae: "3" }, graph), null, "no node that makes VAEs");
  vae.comfyClass = "WanVAECreateVideo";
  assert.equal(makerOf(said, graph), vae, "its VIDEO was read");
  assert.equal(makerOf({ ...said, workflow: "b" }, graph), null);
});

test("a report fits its own workflow, and without an id none", () => {
  assert.equal(fitsWorkflow(message("1", "done", "a"), { id: "a" }), true);
  assert.equal(fitsWorkflow(message("1", "done", "a"), { id: "b" }), false);
  assert.equal(fitsWorkflow(message("1", "done", null), { id: "b" }), false);
  assert.equal(fitsWorkflow(message("1", "done", null), {}), false);
  assert.equal(fitsWorkflow(message("1", "done", "a"), {}), false);
});

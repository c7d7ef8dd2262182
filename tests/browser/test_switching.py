"""Switching between ComfyUI's VAE nodes and ours, in the real frontends."""

from __future__ import annotations

import pytest

from tests.browser.workflows import accelerated_workflow, workflow

pytestmark = pytest.mark.browser

# What a graph is to a user: nodes by place with their looks, links by the places that they join.
PICTURE = """async () => {
  // A group asks for the area of a node, which is known when it has been drawn.
  for (let i = 0; i < 2; i += 1) await new Promise((drawn) => requestAnimationFrame(drawn));
  const graphs = [];
  const walk = (graph) => {
    const name = (id) => ({ "-10": "in", "-20": "out" })[id] ??
      graph.getNodeById(id).type.replace("WanVAE", "VAE");
    graphs.push({
      nodes: graph.nodes.map((node) => ({
        type: node.type, title: node.title, pos: [...node.pos], color: node.color ?? null,
        bgcolor: node.bgcolor ?? null, mode: node.mode,
      })).sort((a, b) => a.type.localeCompare(b.type)),
      links: [...graph.links.values()].map((link) => [
        name(link.origin_id), link.origin_slot, name(link.target_id), link.target_slot,
      ].join(" ")).sort(),
      reroutes: graph.reroutes?.size ?? 0,
      groups: graph.groups.map((group) => {
        group.recomputeInsideNodes();
        return [...group.children].map((item) => item.type.replace("WanVAE", "VAE"));
      }),
    });
    for (const node of graph.nodes) if (node.subgraph) walk(node.subgraph);
  };
  walk(window.app.graph);
  return graphs;
}"""
CHOOSE = """([type, wanted]) => {
  const find = (graph) => graph.nodes.find((node) => node.type === type) ??
    graph.nodes.filter((node) => node.subgraph).map((node) => find(node.subgraph)).find(Boolean);
  const items = window.app.collectNodeMenuItems(find(window.app.graph)).filter(Boolean);
  const item = items.find(({ content }) => content === wanted);
  if (!item) throw new Error(items.map(({ content }) => content).join(", "));
  item.callback();
}"""


def picture(frontend):
    return frontend.page.evaluate(PICTURE)


def choose(frontend, node: str, item: str) -> None:
    """Take `item` from the menu of the first node of class `node`."""
    frontend.page.evaluate(CHOOSE, [node, item])


def undo(frontend) -> None:
    frontend.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Undo')")
    frontend.page.wait_for_function("() => !window.app.configuringGraph")


def of_core(identity: str) -> dict:
    """VAE Decode (Tiled) with a name, colours, a reroute before it and a group around it."""
    made = workflow(seed=1, identity=identity)
    made["nodes"][2] |= {
        "type": "VAEDecodeTiled",
        "title": "Mine",
        "color": "#223344",
        "bgcolor": "#334455",
        "widgets_values": [128, 32, 16, 8],
        "size": [300, 150],
    }
    made["groups"] = [
        {"id": 1, "title": "Group", "bounding": [380, 20, 360, 300], "color": "#3f789e"}
    ]
    reroute = {"id": 1, "pos": [370, 300], "linkIds": [2]}
    made["extra"] |= {
        "reroutes": [reroute],
        "linkExtensions": [{"id": 2, "parentId": 1}],
    }
    return made


def in_subgraph(identity: str) -> dict:
    """VAE Decode inside a subgraph, with all of its links to the border."""
    made = workflow(seed=1, identity=identity)
    inner = dict(made["nodes"][2]) | {"type": "VAEDecode", "widgets_values": [], "size": [210, 46]}
    border = {"bounding": [0, 0, 120, 60]}
    slot = {"linkIds": [], "pos": [0, 0]}
    links = [(1, -10, 0, 3, 0, "LATENT"), (2, -10, 1, 3, 1, "VAE"), (3, 3, 0, -20, 0, "IMAGE")]
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    kind = "11111111-1111-4111-8111-111111111111"
    inner["inputs"] = [
        {"name": "samples", "type": "LATENT", "link": 1},
        {"name": "vae", "type": "VAE", "link": 2},
    ]
    inner["outputs"] = [{"name": "IMAGE", "type": "IMAGE", "links": [3]}]
    definition = {
        "id": kind,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": 3, "lastLinkId": 3, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": "Decode",
        "inputNode": {"id": -10, **border},
        "outputNode": {"id": -20, **border},
        "inputs": [
            slot | {"id": f"{kind[:-1]}2", "name": "samples", "type": "LATENT", "linkIds": [1]},
            slot | {"id": f"{kind[:-1]}3", "name": "vae", "type": "VAE", "linkIds": [2]},
        ],
        "outputs": [
            slot | {"id": f"{kind[:-1]}4", "name": "IMAGE", "type": "IMAGE", "linkIds": [3]}
        ],
        "widgets": [],
        "nodes": [inner],
        "groups": [],
        "links": [dict(zip(names, link, strict=True)) for link in links],
        "extra": {},
    }
    made["nodes"][2] = dict(made["nodes"][2]) | {"type": kind, "widgets_values": []}
    made["definitions"] = {"subgraphs": [definition]}
    return made


def test_the_menu_switches_and_one_undo_takes_it_back(frontend):
    frontend.load(of_core(f"switch-{frontend.mode}"))
    before = picture(frontend)
    (graph,) = before
    assert graph["reroutes"] == 1 and graph["groups"] == [["VAEDecodeTiled"]]
    choose(frontend, "VAEDecodeTiled", "Use Wan VAE Decode")
    (switched,) = picture(frontend)
    ours = next(node for node in switched["nodes"] if node["type"] == "WanVAEDecode")
    core = next(node for node in graph["nodes"] if node["type"] == "VAEDecodeTiled")
    assert ours == core | {"type": "WanVAEDecode"}, "name, place and colours"
    assert switched["links"] == [link.replace("DecodeTiled", "Decode") for link in graph["links"]]
    assert switched["reroutes"] == 1 and switched["groups"] == [["VAEDecode"]]
    undo(frontend)
    assert picture(frontend) == before

    choose(frontend, "VAEDecodeTiled", "Use Wan VAE Decode")
    choose(frontend, "WanVAEDecode", "Use VAE Decode (Tiled) again")
    assert picture(frontend) == before
    values = frontend.page.evaluate(
        """() => window.app.graph.nodes.find((node) => node.type === "VAEDecodeTiled")
          .widgets.map((widget) => widget.value)"""
    )
    assert values == [128, 32, 16, 8], "the tiles that it had"


def test_a_node_in_a_subgraph_keeps_its_links_to_the_border(frontend):
    frontend.load(in_subgraph(f"switch-inside-{frontend.mode}"))
    before = picture(frontend)
    assert len(before) == 2 and len(before[1]["links"]) == 3
    choose(frontend, "VAEDecode", "Use Wan VAE Decode")
    after = picture(frontend)
    assert [node["type"] for node in after[1]["nodes"]] == ["WanVAEDecode"]
    assert after[1]["links"] == before[1]["links"]
    frontend.queue()
    frontend.open_tab()
    card = frontend.page.locator(".wan-vae-card", has_text="9 frames · ").first
    card.wait_for()
    assert card.locator("> summary").inner_text().startswith("Wan VAE Decode #3:")


def test_one_command_for_the_whole_workflow(frontend):
    """VAE Decode and image to video with one Load VAE; a VAE of another file is left alone."""
    made = accelerated_workflow(seed=4, identity=f"command-{frontend.mode}")
    made["nodes"] = [node for node in made["nodes"] if node["type"] != "WanVAEAccelerate"]
    made["links"] = [[1, 1, 0, 3, 1, "VAE"], [2, 2, 0, 3, 0, "LATENT"], [3, 3, 0, 4, 0, "*"]]
    made["nodes"][0]["widgets_values"] = ["wan21.safetensors"]
    made["nodes"][2]["inputs"][1]["link"] = 1
    frontend.load(made)
    frontend.page.evaluate(
        """() => {
          const { graph } = window.app;
          const add = (type, pos) => {
            const node = window.LiteGraph.createNode(type);
            node.pos = pos;
            graph.add(node);
            return node;
          };
          const loader = graph.nodes.find((node) => node.type === "VAELoader");
          const image = add("WanImageToVideo", [400, 300]);
          loader.connect(0, image, image.inputs.findIndex(({ name }) => name === "vae"));
          const [other, decode] = [add("VAELoader", [40, 600]), add("VAEDecode", [400, 600])];
          other.widgets[0].value = "image_vae.safetensors";
          other.connect(0, decode, 1);
          window.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState();
        }"""
    )
    before = picture(frontend)
    frontend.page.evaluate(
        "() => void window.app.extensionManager.command.execute('WanVAE.UseInWorkflow')"
    )
    frontend.page.get_by_text("take the place of 1 nodes").wait_for()
    frontend.page.get_by_role("button", name="Confirm").click()
    frontend.page.wait_for_function(
        "() => window.app.graph.nodes.some((node) => node.type === 'WanVAEAccelerate')"
    )
    (graph,) = picture(frontend)
    kinds = [node["type"] for node in graph["nodes"]]
    assert kinds.count("WanVAEDecode") == kinds.count("VAEDecode") == 1
    assert "VAELoader 0 VAEAccelerate 0" in graph["links"]
    assert "VAELoader 0 VAEDecode 1" in graph["links"], "ours needs no other VAE"
    (image,) = (link for link in graph["links"] if "ImageToVideo" in link)
    assert image.startswith("VAEAccelerate 0 ")
    undo(frontend)
    assert picture(frontend) == before


def test_a_right_click_on_the_node_offers_it(frontend):
    """The menu that the frontend draws itself, on the canvas or over it, and a click in it."""
    if (frontend.name, frontend.mode) == ("pinned", "nodes2"):
        pytest.skip(
            "frontend 1.32.9 shows no extension's entries in Nodes 2.0: the command does it"
        )
    frontend.load(of_core(f"click-{frontend.name}-{frontend.mode}"))
    frontend.fit()
    x, y = frontend.page.evaluate(
        """() => {
          const { canvas, graph } = window.app;
          const node = graph.nodes.find(({ type }) => type === "VAEDecodeTiled");
          const area = canvas.canvas.getBoundingClientRect();
          const [left, top] = [node.pos[0] + 60, node.pos[1] - 12]; // in its title
          return [
            (left + canvas.ds.offset[0]) * canvas.ds.scale + area.left,
            (top + canvas.ds.offset[1]) * canvas.ds.scale + area.top,
          ];
        }"""
    )
    frontend.page.mouse.click(x, y, button="right")
    item = frontend.page.get_by_text("Use Wan VAE Decode", exact=True)
    item.first.wait_for()
    frontend.shot("menu")
    item.first.click()
    frontend.page.wait_for_function(
        "() => window.app.graph.nodes.some(({ type }) => type === 'WanVAEDecode')"
    )

"""Workflows in the format that the frontend loads."""

from __future__ import annotations

import uuid


def _node(number, kind, position, widgets, inputs=(), outputs=(), size=(300, 140)) -> dict:
    return {
        "id": number,
        "type": kind,
        "pos": list(position),
        "size": list(size),
        "flags": {},
        "order": number,
        "mode": 0,
        "properties": {},
        "widgets_values": list(widgets),
        "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
        "outputs": [
            {"name": name, "type": type_, "links": links} for name, type_, links in outputs
        ],
    }


def workflow_id(name: str) -> str:
    """The frontend takes only UUIDs."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def workflow(
    seed=0,
    frames=3,
    height=8,
    width=12,
    vae="wan21.safetensors",
    channels=16,
    identity="w1",
    chunk=0,
) -> dict:
    """Latent and VAE into WanVAEDecode (node 3), and something that wants its image."""
    nodes = [
        _node(1, "VAELoader", (40, 80), [vae], outputs=[("VAE", "VAE", [1])], size=(300, 80)),
        _node(
            2,
            "ProbeLatent",
            (40, 220),
            [1, channels, frames, height, width, seed, "plain"],
            outputs=[("LATENT", "LATENT", [2])],
            size=(300, 260),
        ),
        _node(
            3,
            "WanVAEDecode",
            (400, 80),
            ["auto", "auto", chunk],
            inputs=[("samples", "LATENT", 2), ("vae", "VAE", 1)],
            outputs=[("IMAGE", "IMAGE", [3])],
            size=(340, 220),
        ),
        _node(4, "ProbeSink", (800, 80), [], inputs=[("value", "*", 3)], size=(200, 60)),
    ]
    links = [[1, 1, 0, 3, 1, "VAE"], [2, 2, 0, 3, 0, "LATENT"], [3, 3, 0, 4, 0, "*"]]
    return _graph(identity, nodes, links)


def doubled_workflow(seed: int, identity: str) -> dict:
    """The workflow above with a second WanVAEDecode (node 5) that is the same as node 3."""
    made = workflow(seed=seed, identity=identity)
    made["nodes"].append(
        _node(
            5,
            "WanVAEDecode",
            (400, 360),
            made["nodes"][2]["widgets_values"],
            inputs=[("samples", "LATENT", 5), ("vae", "VAE", 4)],
            outputs=[("IMAGE", "IMAGE", [6])],
            size=(340, 220),
        )
    )
    made["nodes"].append(
        _node(6, "ProbeSink", (800, 360), [], inputs=[("value", "*", 6)], size=(200, 60))
    )
    made["nodes"][0]["outputs"][0]["links"].append(4)
    made["nodes"][1]["outputs"][0]["links"].append(5)
    made["links"] += [
        [4, 1, 0, 5, 1, "VAE"],
        [5, 2, 0, 5, 0, "LATENT"],
        [6, 5, 0, 6, 0, "*"],
    ]
    return made | {"last_node_id": 6, "last_link_id": 6}


def sharded_workflow(seed: int, identity: str) -> dict:
    """The workflow above with two CPU workers in WanVAEDecodeSharded as node 3."""
    made = workflow(seed=seed, identity=identity)
    made["nodes"][2] |= {
        "type": "WanVAEDecodeSharded",
        "widgets_values": ["cpu,cpu", "auto", "shared", True, 30.0, "auto", "auto", 0],
        "size": [340, 320],
    }
    return made


def accelerated_workflow(seed: int, identity: str) -> dict:
    """Core's VAE Decode (node 3) with a VAE of WanVAEAccelerate (node 5)."""
    made = workflow(seed=seed, identity=identity)
    made["nodes"][2] |= {"type": "VAEDecode", "widgets_values": [], "size": [340, 60]}
    made["nodes"].append(
        _node(
            5,
            "WanVAEAccelerate",
            (400, 260),
            ["auto", "auto", "one"],
            inputs=[("vae", "VAE", 1)],
            outputs=[("VAE", "VAE", [4])],
            size=(340, 200),
        )
    )
    made["links"][0] = [1, 1, 0, 5, 0, "VAE"]
    made["links"].append([4, 5, 0, 3, 1, "VAE"])
    made["nodes"][2]["inputs"][1]["link"] = 4
    return made | {"last_node_id": 5, "last_link_id": 4}


def video_workflow(kind: str, identity: str) -> dict:
    """A latent and the VAE into node 3, which saves a video, or makes one for Save Video (4)."""
    made = workflow(seed=sum(map(ord, identity)), identity=identity)
    made["nodes"][2] |= {"type": kind, "size": [340, 400]}
    made["nodes"][2]["outputs"] = [{"name": "VIDEO", "type": "VIDEO", "links": [3]}]
    if kind == "WanVAEDecodeToVideo":
        made["nodes"][2]["widgets_values"] = [16, f"video/{identity}", "auto", "auto", 0]
        made["nodes"][2]["outputs"][0]["links"] = []
        del made["nodes"][3], made["links"][2]
    else:
        made["nodes"][2]["widgets_values"] = [16]
        made["nodes"][3] = _node(
            4,
            "SaveVideo",
            (800, 80),
            [f"video/{identity}", "mp4", "h264"],
            inputs=[("video", "VIDEO", 3)],
            size=(300, 320),
        )
        made["links"][2] = [3, 3, 0, 4, 0, "VIDEO"]
    return made


def cat_workflow() -> dict:
    """The sample latent and the miniature VAE of the repository, to a preview. Node 3 decodes."""
    nodes = [
        _node(
            1,
            "VAELoader",
            (40, 60),
            ["wan_vae_mini.safetensors"],
            outputs=[("VAE", "VAE", [1])],
            size=(320, 80),
        ),
        _node(
            2,
            "LoadLatent",
            (40, 210),
            ["cat_416x240_17f.latent"],
            outputs=[("LATENT", "LATENT", [2])],
            size=(320, 80),
        ),
        _node(
            3,
            "WanVAEDecode",
            (420, 60),
            ["auto", "auto", 1],
            inputs=[("samples", "LATENT", 2), ("vae", "VAE", 1)],
            outputs=[("IMAGE", "IMAGE", [3])],
            size=(380, 210),
        ),
        _node(4, "PreviewImage", (420, 340), [], inputs=[("images", "IMAGE", 3)], size=(380, 330)),
    ]
    links = [[1, 1, 0, 3, 1, "VAE"], [2, 2, 0, 3, 0, "LATENT"], [3, 3, 0, 4, 0, "IMAGE"]]
    return _graph("cat", nodes, links)


def decode_workflow(vae: str, latent: str) -> dict:
    """Files named `vae` and `latent` into Wan VAE Decode (node 3), and its image into a file."""
    nodes = [
        _node(
            1,
            "VAELoader",
            (40, 250),
            [vae],
            outputs=[("VAE", "VAE", [1])],
            size=(300, 100),
        ),
        _node(
            2,
            "LoadLatent",
            (40, 60),
            [latent],
            outputs=[("LATENT", "LATENT", [2])],
            size=(300, 100),
        ),
        _node(
            3,
            "WanVAEDecode",
            (380, 60),
            ["auto", "auto", 0],
            inputs=[("samples", "LATENT", 2), ("vae", "VAE", 1)],
            outputs=[("IMAGE", "IMAGE", [3])],
            size=(390, 150),
        ),
        _node(
            4,
            "SaveImage",
            (810, 60),
            ["video/frame"],
            inputs=[("images", "IMAGE", 3)],
            size=(250, 80),
        ),
    ]
    links = [[1, 1, 0, 3, 1, "VAE"], [2, 2, 0, 3, 0, "LATENT"], [3, 3, 0, 4, 0, "IMAGE"]]
    return _graph("decode", nodes, links)


def _graph(identity: str, nodes: list, links: list) -> dict:
    return {
        "id": workflow_id(identity),
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 1, "offset": [0, 0]}},
        "version": 0.4,
    }

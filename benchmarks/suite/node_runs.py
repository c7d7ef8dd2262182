"""Runs of single nodes in a running ComfyUI: their time, and how they used memory."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tests.comfy.server import PACK, REPOSITORY, Comfy, Run
from wan_vae.runs.engine import PROOF_BYTES

VAE_FILE = "wan2.1_random.safetensors"
VAE_FILE_22 = "wan2.2_random.safetensors"
# Channels of their latents, and pixels for a row of one.
_LATENTS = {VAE_FILE: (16, 8), VAE_FILE_22: (48, 16)}
# Nodes of a prompt: the VAE, what is decoded or encoded, the measured node, the probe, and what
# changes the VAE first.
_VAE, _SOURCE, _MEASURED, _PROBE, _PATCH = "1", "2", "3", "4", "5"
# Only in some prompts: a conditioning, the same node with ComfyUI's own VAE, and the comparison.
_CONDITIONING, _CORE, _COMPARED, _BEFORE, _OTHER_PATCH = "6", "7", "8", "9", "10"
_ENCODERS = ("WanVAEEncode", "VAEEncode")
ACCELERATE = "WanVAEAccelerate"
# Flags of ComfyUI that decide where a VAE is and in what numbers; none first.
FLAGS = (
    "default",
    "disable-dynamic-vram",
    "lowvram",
    "novram",
    "gpu-only",
    "fp32-vae",
    "fp16-vae",
    "cpu-vae",
    "cache-none",
)
Scale = Literal["tiny", "small", "usual", "large"]
# Frames, height and width of the videos of each scale.
SIZES: dict[Scale, tuple[tuple[int, int, int], ...]] = {
    "tiny": ((9, 64, 96),),
    "small": ((81, 480, 832),),
    "usual": ((81, 480, 832), (81, 720, 1280)),
    "large": ((81, 480, 832), (81, 720, 1280), (81, 1088, 1920)),
}
# The folder of KJNodes among the packs of the measured ComfyUI.
KJNODES = "ComfyUI-KJNodes"
PATCH_TRITON = "PatchTritonVAE"
# The values that its node has by itself. ComfyUI's API asks for each of them.
_PATCH_INPUTS: Mapping[str, Mapping[str, object]] = {
    PATCH_TRITON: {
        "fuse_norm_silu": True,
        "channels_last": True,
        "int8_conv": False,
        "autotune": False,
    }
}


@dataclass(frozen=True)
class NodeCase:
    """A node and the size of its video in pixels: run once, then `warm` times with other values.

    patch: the class of a node that changes the VAE first, with the values that it has by itself
    and `patch_inputs`; before: of one that comes before that. vae: the file that is loaded.
    """

    title: str
    node: str
    frames: int
    height: int
    width: int
    warm: int = 1
    inputs: Mapping[str, object] = field(default_factory=dict)
    patch: str | None = None
    before: str | None = None
    patch_inputs: Mapping[str, object] = field(default_factory=dict)
    vae: str = VAE_FILE

    @property
    def video(self) -> str:
        """The size of the video in words."""
        return f"{self.width} x {self.height}, {self.frames} frames"

    def prompt(self, seed: int) -> dict[str, Any]:
        """The API prompt: random numbers from `seed` into the node, and its result to the probe."""
        vae = _VAE if self.patch is None else _PATCH
        inputs: dict[str, object] = {"vae": [vae, 0], **self.inputs}
        conditioning = {}
        if self.node in (*_ENCODERS, "WanImageToVideo"):
            source = _node(
                "ProbeFrames",
                frames=1 if self.node == "WanImageToVideo" else self.frames,
                height=self.height,
                width=self.width,
                channels=3,
                seed=seed,
            )
            name = "pixels"
            if self.node == "WanImageToVideo":
                name = "start_image"
                conditioning = {_CONDITIONING: _node("ProbeConditioning")}
                inputs |= {
                    "positive": [_CONDITIONING, 0],
                    "negative": [_CONDITIONING, 0],
                    "width": self.width,
                    "height": self.height,
                    "length": self.frames,
                    "batch_size": 1,
                }
        else:
            channels, factor = _LATENTS[self.vae]
            source = _node(
                "ProbeLatent",
                batch=1,
                channels=channels,
                frames=(self.frames - 1) // 4 + 1,
                height=self.height // factor,
                width=self.width // factor,
                seed=seed,
                kind="plain",
            )
            name = "samples"
        inputs[name] = [_SOURCE, 0]
        patch = {}
        if self.before is not None:
            patch[_BEFORE] = _patch(self.before, _VAE)
        if self.patch is not None:
            loaded = _VAE if self.before is None else _BEFORE
            patch[_PATCH] = _patch(self.patch, loaded)
            patch[_PATCH]["inputs"] |= self.patch_inputs
        return {
            _VAE: _node("VAELoader", vae_name=self.vae),
            **patch,
            **conditioning,
            _SOURCE: source,
            _MEASURED: _node(self.node, **inputs),
            _PROBE: _node("WanVAEBenchMemory", value=[_MEASURED, 0]),
        }

    def comparison(self, seed: int) -> dict[str, Any]:
        """The same node with our VAE and with ComfyUI's own, and what they gave compared."""
        prompt = self.prompt(seed)
        measured = prompt[_MEASURED]
        core = {**measured["inputs"], "vae": [_VAE, 0]}
        prompt[_CORE] = _node(self.node, **core)
        prompt[_COMPARED] = _node("ProbeCompare", core=[_CORE, 0], ours=[_MEASURED, 0])
        return prompt

    def comparison_with(self, other: NodeCase, seed: int) -> dict[str, Any]:
        """This case and `other`, of the same video, and what they gave compared."""
        prompt, theirs = self.prompt(seed), other.prompt(seed)
        inputs = dict(theirs[_MEASURED]["inputs"])
        if other.patch is not None:
            prompt[_OTHER_PATCH] = theirs[_PATCH]
            inputs["vae"] = [_OTHER_PATCH, 0]
        prompt[_CORE] = _node(other.node, **inputs)
        prompt[_COMPARED] = _node("ProbeCompare", core=[_CORE, 0], ours=[_MEASURED, 0])
        return prompt


def _patch(class_type: str, loaded: str) -> dict[str, Any]:
    """A node that changes the VAE of the node `loaded`, with the values that it has by itself."""
    return _node(class_type, vae=[loaded, 0], **_PATCH_INPUTS.get(class_type, {}))


def _node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def cases(on_cpu: bool) -> tuple[NodeCase, ...]:
    """What is run: published sizes on a GPU, and small ones on the CPU, to try the command out."""
    large, small = ((81, 720, 1280), (17, 480, 832)) if not on_cpu else ((9, 64, 96), (5, 64, 64))
    video = {"fps": 16.0, "filename_prefix": "video/bench"}
    sharded = {"devices": "cpu,cpu" if on_cpu else "0", "axis": "auto", "gather": "shared"}
    return (
        NodeCase("Wan VAE Decode", "WanVAEDecode", *large, warm=3),
        NodeCase("Wan VAE Decode (Sharded)", "WanVAEDecodeSharded", *large, inputs=sharded),
        NodeCase("Wan VAE Encode", "WanVAEEncode", *small),
        NodeCase("Wan VAE Decode to Video", "WanVAEDecodeToVideo", *small, inputs=video),
        NodeCase("VAE Decode (ComfyUI's own)", "VAEDecode", *large),
    )


def peer_cases(on_cpu: bool, kjnodes: bool) -> tuple[NodeCase, ...]:
    """Our nodes and what they stand for, one after the other: decode, encode, one image.

    KJNodes comes last: it changes the memory format of the weights that ComfyUI's own VAE uses.
    """
    video, image = ((81, 720, 1280), (1, 1024, 1024)) if not on_cpu else ((5, 64, 64), (1, 64, 64))
    patched = NodeCase("VAE Decode behind KJNodes' Patch Triton VAE", "VAEDecode", *video, warm=3)
    return (
        NodeCase("Wan VAE Decode", "WanVAEDecode", *video, warm=5),
        NodeCase("VAE Decode (ComfyUI's own)", "VAEDecode", *video, warm=3),
        NodeCase("Wan VAE Encode", "WanVAEEncode", *video, warm=3),
        NodeCase("VAE Encode (ComfyUI's own)", "VAEEncode", *video, warm=3),
        NodeCase("Wan VAE Decode", "WanVAEDecode", *image, warm=9),
        NodeCase("VAE Decode (ComfyUI's own)", "VAEDecode", *image, warm=9),
        *((replace(patched, patch=PATCH_TRITON),) if kjnodes else ()),
    )


def everywhere_cases(
    scale: Scale, kjnodes: bool = False, own_warm: int = 1
) -> tuple[NodeCase, ...]:
    """Core's image to video and VAE Decode with our VAE, and with ComfyUI's own.

    kjnodes: also with our VAE made of one that KJNodes' Patch Triton VAE has patched. Ours comes
    first: after ComfyUI's own has run out of memory, that is not free for some time. KJNodes comes
    last: it changes the memory format of the weights that ComfyUI's own VAE uses. own_warm: runs of
    ComfyUI's own after the first; with little memory one of them takes 45 s and more at 1080p.
    """
    sizes = SIZES[scale]
    ours = [
        NodeCase(f"{title}, our VAE", node, *size, warm=3, patch=ACCELERATE)
        for title, node in (("image to video", "WanImageToVideo"), ("VAE Decode", "VAEDecode"))
        for size in sizes
    ]
    short = min(17, sizes[0][0])
    alone = NodeCase("Wan VAE Decode", "WanVAEDecode", short, *sizes[0][1:], warm=3)
    behind = [
        replace(case, title=f"{case.title}, behind {PATCH_TRITON}", before=PATCH_TRITON)
        for case in ours[:: len(sizes)]
        if kjnodes
    ]
    return (*ours, alone, *(own(case, own_warm) for case in ours), *behind)


def own(case: NodeCase, warm: int) -> NodeCase:
    """The same node with ComfyUI's own VAE."""
    title = case.title.replace("our VAE", "ComfyUI's own")
    return replace(case, title=title, warm=warm, patch=None)


@dataclass(frozen=True)
class NodeRow:
    """What the runs of one case took; all but the times is of the last run.

    Times are from the message that the node is executing to the message that it is done or that the
    next one is executing. median_ms: of the warm runs; without any, the first run. asked_bytes:
    what ComfyUI was asked to free, call by call; empty where that cannot be seen (before Python
    3.12). peak_bytes: of PyTorch's allocator in ComfyUI's process, above what it held after the run
    before; None on the CPU. report: the node's own. flags: of ComfyUI. difference: the largest one
    to ComfyUI's own VAE (of several devices: to one device), in units of the spread of its numbers
    where that is above 1; None if it was not compared. error: of a run that failed; then there are
    no other numbers. host_ms: medians of the warm runs by phase, of the report's `host_ms`.
    restart_ms, restart_host_ms: of a run after the workers ended.
    """

    node: str
    class_type: str
    video: str
    first_ms: float
    warm_ms: tuple[float, ...]
    median_ms: float
    asked_bytes: tuple[int, ...]
    peak_bytes: int | None
    report: dict[str, Any] | None
    flags: str = ""
    difference: float | None = None
    error: str = ""
    # Of the first result: a run with the same numbers must have the same bits. None for a file.
    digest: int | None = None
    # What had happened before, on purpose; the run may then have started over.
    after: str = ""
    host_ms: Mapping[str, float] = field(default_factory=dict)
    restart_ms: float | None = None
    restart_host_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def warm(self) -> str:
        """The warm runs for a table: their median, smallest to largest; or that there was one run
        only."""
        if not self.warm_ms:
            return f"{self.median_ms:.1f} (first run)"
        if len(self.warm_ms) == 1:
            return f"{self.median_ms:.1f}"
        return f"{self.median_ms:.1f} ({min(self.warm_ms):.1f} to {max(self.warm_ms):.1f})"

    def in_a_line(self) -> str:
        """What came of it, for who waits."""
        if self.error:
            return self.error
        then = f", then {self.median_ms:.1f} ms" if self.warm_ms else ""
        return f"{self.first_ms:.0f} ms{then}"

    def faults(self) -> list[str]:
        """What is wrong with a node of ours: a run that is not done, memory not as planned."""
        if self.error:
            is_ours = self.class_type.startswith("WanVAE") or "our VAE" in self.node
            return [f"{self.node} {self.flags}: {self.error}"] if is_ours else []
        if self.report is None:
            return []
        planned = self.report["plan"]["planned_bytes"]
        found = []
        if self.report["status"] != "done":
            found.append(f"{self.node}: the report says {self.report['status']}")
        if self.report["memory"]["planned_bytes"] != planned:
            found.append(f"{self.node}: the plan of the run is not the one of its memory")
        # Where ComfyUI could not free as much as it was asked for, the run took a smaller plan.
        again = any(note.startswith("planned again") for note in self.report["plan"]["notes"])
        # Results from before reports had needed_bytes asked for the planned bytes.
        needed = self.report["plan"].get("needed_bytes", planned)
        # A node that brings its weights asks for nothing else, or for what proofs take. It asks for
        # what the plan needs only where that is not free.
        asked = self.asked_bytes[-1] if self.asked_bytes else 0
        if asked not in (0, PROOF_BYTES, needed) and not again:
            found.append(f"{self.node}: {needed} bytes are needed, ComfyUI was asked for {asked}")
        if self.report.get("restarts", 0) and not self.after:
            found.append(f"{self.node}: memory ran out, {self.report['fallbacks']}")
        return found

    def as_dict(self) -> dict[str, object]:
        """The row for a JSON file."""
        return asdict(self)


class NodeClock:
    """Milliseconds of one node, from the messages of a websocket as they arrive."""

    def __init__(self, node_id: str) -> None:
        self._node = node_id
        self._started: float | None = None
        self._ended: float | None = None

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take a message; call this as soon as it arrives."""
        kind, now = message["type"], time.perf_counter()
        if kind not in ("executing", "executed"):
            return
        is_own = message["data"]["node"] == self._node
        if self._started is None:
            if kind == "executing" and is_own:
                self._started = now
        elif self._ended is None and (kind == "executing") != is_own:
            self._ended = now

    @property
    def ms(self) -> float:
        if self._started is None or self._ended is None:
            raise RuntimeError(f"node {self._node} was not executed: ComfyUI kept its result")
        return (self._ended - self._started) * 1e3


def measure(server: Comfy, case: NodeCase, seed: int) -> NodeRow:
    """Run `case` with `seed` and the numbers after it. Raises RuntimeError if a node fails."""
    times, phases, digests = [], [], []
    for number in range(1 + case.warm):
        ms, run = timed_run(server, case, seed + number)
        times.append(ms)
        phases.append(host_phases(run, case))
        digests += run.outputs[_PROBE].get("digest", [])
    host_ms = {
        name: statistics.median(found.get(name, 0.0) for found in phases[1:] or phases)
        for name in phases[-1]
    }
    row = _row(server, case, times, run)
    return replace(row, host_ms=host_ms, digest=digests[0] if digests else None)


def timed_run(server: Comfy, case: NodeCase, seed: int) -> tuple[float, Run]:
    """Milliseconds of the node in one run of `case`. Raises RuntimeError if a node fails."""
    clock = NodeClock(_MEASURED)
    run = server.run(case.prompt(seed), on_message=clock.hear)
    if run.error is not None:
        raise RuntimeError(f"{case.title}: {run.error['exception_message']}")
    return clock.ms, run


def host_phases(run: Run, case: NodeCase) -> dict[str, float]:
    """Milliseconds of the host by phase, by the report of the measured node."""
    phases: dict[str, float] = (_report(run, case) or {}).get("host_ms", {})
    return phases


def failed(case: NodeCase, error: RuntimeError) -> NodeRow:
    """The row of a case that did not run through."""
    lines = str(error).splitlines()
    return NodeRow(case.title, case.node, case.video, 0, (), 0, (), None, None, error=lines[0])


def difference(server: Comfy, case: NodeCase, prompt: Mapping[str, Any]) -> float:
    """How far `case` is from what a `prompt` of its comparisons holds it against. Raises
    RuntimeError."""
    run = server.run(dict(prompt))
    if run.error is not None:
        raise RuntimeError(f"{case.title}: {run.error['exception_message']}")
    found = [one for one in run.outputs[_COMPARED]["found"] if one["core"] != "None"]
    if not found or any(one["core"] != one["ours"] for one in found):
        raise RuntimeError(f"{case.title}: not the shape, dtype and device of the other")
    return max(one["difference"] / max(1.0, one["spread"]) for one in found)


def _row(server: Comfy, case: NodeCase, times: list[float], run: Run) -> NodeRow:
    memory = run.outputs[_PROBE]
    (start,), (peak,) = memory["start"], memory["peak"]
    return NodeRow(
        node=case.title,
        class_type=case.node,
        video=case.video,
        first_ms=times[0],
        warm_ms=tuple(times[1:]),
        median_ms=statistics.median(times[1:] or times),
        asked_bytes=tuple(memory["asked"]),
        peak_bytes=None if peak is None or start is None else peak - start,
        report=_report(run, case),
    )


def _report(run: Run, case: NodeCase) -> dict[str, Any] | None:
    """The report of the measured node, which the server keeps for the panel; None without one."""
    if not case.node.startswith("WanVAE") and case.patch != ACCELERATE:
        return None
    kept = run.kept
    (report,) = (m["report"] for m in kept if (m["node"], m["kind"]) == (_MEASURED, case.node))
    found: dict[str, Any] = report
    return found


def link_pack(custom_nodes: Path) -> Path:
    """Put this repository into `custom_nodes` as a link."""
    link = custom_nodes / PACK
    link.symlink_to(REPOSITORY, target_is_directory=True)
    return link


def install_probes(server: Comfy) -> None:
    """Add the nodes that make inputs and the one that looks at memory; before the server starts."""
    server.install_probe()
    probe = Path(__file__).with_name("comfyui_probe.py")
    shutil.copyfile(probe, server.base / "custom_nodes" / "wan_vae_bench_probe.py")

"""Nodes of the test server that hold two VAE objects, or what nodes made with them, side by side.

Copied into the server's custom_nodes as a pack of its own; not part of the pack under test.
"""

import collections
import copy
import gc
import itertools
import os
import sys
import types

import comfy.model_management as model_management
import comfy.nested_tensor
import comfy.sd
import torch
from comfy_execution.graph_utils import GraphBuilder


def _facts(value):
    if isinstance(value, torch.Tensor):
        return [list(value.shape), str(value.dtype), str(value.device)]
    return repr(value)


def _compared(core, ours):
    """Facts of both, and how far the numbers are apart; `spread` says what the numbers are."""
    found = {"core": _facts(core), "ours": _facts(ours)}
    if isinstance(core, torch.Tensor) and found["core"] == found["ours"]:
        found["difference"] = float((core.float() - ours.float()).abs().max())
        found["spread"] = float(core.float().std()) if core.numel() > 1 else 0.0
    return found


def _tensors(value, path=""):
    """Every tensor in nested lists and dictionaries, by its place."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _tensors(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{path}[{index}]")


class _Probe:
    RETURN_TYPES = ()
    FUNCTION = "probe"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True


class ProbeCompare(_Probe):
    """Compares all tensors in two outputs of any type."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"core": ("*",), "ours": ("*",)}}

    def probe(self, core, ours):
        theirs, mine = dict(_tensors(core)), dict(_tensors(ours))
        found = [{"name": n, **_compared(theirs.get(n), mine.get(n))} for n in {**theirs, **mine}]
        return {"ui": {"found": found}}


class ProbeConditioning:
    """A conditioning that no text encoder made."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return ([[torch.zeros(1, 4, 8), {}]],)


class _NoTextEncoder:
    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, _tokens):
        return [[torch.zeros(1, 4, 8), {}]]


class ProbeClip:
    """A text encoder that reads nothing."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (_NoTextEncoder(),)


class ProbeMask:
    """A mask of a box."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {"min": 1, "max": 1 << 14})
        return {"required": {name: number for name in ("frames", "height", "width")}}

    def make(self, frames, height, width):
        mask = torch.zeros(frames, height, width)
        mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
        return (mask,)


def _random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _latent(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _images(vae, pixels):
    """`pixels` as a batch of images; the VAE is set back afterwards."""
    was, vae.not_video = vae.not_video, True
    try:
        return vae.encode(pixels)
    finally:
        vae.not_video = was


TILES = {"tile_x": 64, "tile_y": 64, "overlap": 8, "tile_t": 16, "overlap_t": 2}
PIXEL_TILES = {"tile_x": 512, "tile_y": 512, "overlap": 64, "tile_t": 64, "overlap_t": 8}

# What both are asked: the same, so that every number can be compared.
CALLS = {
    "decode a video": lambda vae: vae.decode(_latent(1, 16, 3, 6, 10)),
    "decode one frame": lambda vae: vae.decode(_latent(1, 16, 1, 6, 10)),
    "decode a batch": lambda vae: vae.decode(_latent(2, 16, 2, 5, 7)),
    "decode images": lambda vae: vae.decode(_latent(3, 16, 1, 5, 7)),
    "decode bfloat16": lambda vae: vae.decode(_latent(1, 16, 2, 4, 4).bfloat16()),
    "decode with options": lambda vae: vae.decode(_latent(1, 16, 1, 4, 4), vae_options={}),
    "decode_tiled": lambda vae: vae.decode_tiled(_latent(1, 16, 3, 6, 10), **TILES),
    "encode a video": lambda vae: vae.encode(_random(9, 48, 64, 3)),
    "encode one frame": lambda vae: vae.encode(_random(1, 48, 64, 3)),
    "encode and drop frames": lambda vae: vae.encode(_random(7, 48, 64, 3)),
    "encode and crop": lambda vae: vae.encode(_random(5, 53, 70, 3)),
    "encode float16": lambda vae: vae.encode(_random(5, 32, 32, 3).half()),
    "encode images": lambda vae: _images(vae, _random(3, 48, 64, 3)),
    "encode videos": lambda vae: vae.encode(_random(2, 16, 48, 64, 3)),
    "encode_tiled": lambda vae: vae.encode_tiled(_random(7, 53, 70, 3), **PIXEL_TILES),
    "crop": lambda vae: vae.vae_encode_crop_pixels(_random(2, 53, 70, 3)),
    "process_input": lambda vae: vae.process_input(_random(1, 3, 1, 2, 2)),
    "process_output": lambda vae: vae.process_output(_latent(1, 3, 1, 2, 2)),
}
# What core of 0.3.75 cannot do; the answer is that to the other question.
OURS_ALONE = {
    "decode images without time": (
        lambda vae: vae.decode(_latent(3, 16, 5, 7)),
        lambda vae: vae.decode(_latent(3, 16, 5, 7).unsqueeze(2)),
    ),
    "decode a nested latent": (
        lambda vae: vae.decode(
            comfy.nested_tensor.NestedTensor((_latent(1, 16, 2, 4, 4), torch.zeros(1, 8, 5)))
        ),
        lambda vae: vae.decode(_latent(1, 16, 2, 4, 4)),
    ),
    "encode four channels": (
        lambda vae: vae.encode(_random(1, 32, 32, 4)),
        lambda vae: vae.encode(_random(1, 32, 32, 4)[..., :3]),
    ),
}
# Exact where core blends tiles: our answer to both must be the same, bit for bit.
EXACT = {
    "decode in small tiles": (
        lambda vae: vae.decode_tiled(
            _latent(1, 16, 4, 12, 16), tile_x=8, tile_y=8, overlap=2, tile_t=2, overlap_t=1
        ),
        lambda vae: vae.decode(_latent(1, 16, 4, 12, 16)),
    ),
    "decode in tiles without sizes": (
        lambda vae: vae.decode_tiled(_latent(1, 16, 2, 6, 6), overlap=4),
        lambda vae: vae.decode(_latent(1, 16, 2, 6, 6)),
    ),
    "encode in small tiles": (
        lambda vae: vae.encode_tiled(
            _random(9, 96, 96, 3), tile_x=64, tile_y=64, overlap=16, tile_t=8, overlap_t=4
        ),
        lambda vae: vae.encode(_random(9, 96, 96, 3)),
    ),
}
# Answers that are no tensors; a method that this ComfyUI does not have is missing in both.
ANSWERS = (
    "spacial_compression_encode",
    "spacial_compression_decode",
    "temporal_compression_decode",
    "model_size",
    "throw_exception_if_invalid",
    "vae_output_dtype",
    "is_dynamic",
)
ATTRIBUTES = (
    "vae_dtype",
    "device",
    "output_device",
    "latent_channels",
    "latent_dim",
    "output_channels",
    "not_video",
    "disable_offload",
    "crop_input",
    "size",
    "working_dtypes",
)
SAME_OBJECTS = (
    "patcher",
    "first_stage_model",
    "downscale_ratio",
    "upscale_ratio",
    "downscale_index_formula",
    "upscale_index_formula",
    "memory_used_encode",
    "memory_used_decode",
    "process_input",
    "process_output",
)


def _attempt(call, vae):
    """The answer, or how the error is called."""
    try:
        return call(vae)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class ProbeSameVAE(_Probe):
    """Asks core's VAE and ours the same questions."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"core": ("VAE",), "ours": ("VAE",)}}

    def probe(self, core, ours):
        before = dict(vars(core))
        found = [
            {"name": name, **_compared(_attempt(call, core), _attempt(call, ours))}
            for name, call in CALLS.items()
        ]
        for name, (asked, instead) in OURS_ALONE.items():
            answers = _compared(_attempt(instead, core), _attempt(asked, ours))
            found.append({"name": name, **answers})
        exact = [
            {"name": name, **_compared(_attempt(whole, ours), _attempt(tiled, ours))}
            for name, (tiled, whole) in EXACT.items()
        ]

        def answer(name):
            return lambda vae: repr(getattr(vae, name)()) if hasattr(vae, name) else "missing"

        answers = {
            name: [_attempt(answer(name), core), _attempt(answer(name), ours)] for name in ANSWERS
        }
        answers |= {
            name: [repr(getattr(core, name)), repr(getattr(ours, name))] for name in ATTRIBUTES
        }
        answers["get_sd"] = [sorted(core.get_sd()), sorted(ours.get_sd())]
        if hasattr(core, "prepare_decode"):
            shape = (1, 16, 2, 4, 4)
            answers["prepare_decode"] = [
                core.prepare_decode(shape) > 0,
                ours.prepare_decode(shape) > 0,
            ]
        copied = copy.copy(ours)
        copied.patcher = "another"
        return {
            "ui": {
                "found": found,
                "exact": exact,
                "answers": [answers],
                "same": [[n for n in SAME_OBJECTS if getattr(core, n) is not getattr(ours, n)]],
                "is_a_vae": [isinstance(ours, comfy.sd.VAE)],
                "copies": [type(copied) is type(ours) and ours.patcher is core.patcher],
                "untouched": [dict(vars(core)) == before and type(core) is comfy.sd.VAE],
            }
        }


class ProbePatchedVAE:
    """A copy of a VAE as other packs make it. `kind` says what they do to it.

    object_patches: a fused layer in place of two, in a patcher of its own, and loaded. subclass: a
    class of its own with another decode and one method more. method: a decode of the object.
    weights: a patch on a weight. scaled: pixels in [0, 255]. disguised: no VAE class at all.
    """

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "kind": ("STRING", {})}}

    def make(self, vae, kind):
        made = copy.copy(vae)
        made.patcher = vae.patcher.clone()
        if kind == "object_patches":
            place = "decoder.middle.0.residual"
            norm = made.first_stage_model.decoder.middle[0].residual[0]
            made.patcher.add_object_patch(f"{place}.0", _Fused(norm))
            made.patcher.add_object_patch(f"{place}.1", torch.nn.Identity())
            comfy.model_management.load_models_gpu([made.patcher])
            if not isinstance(made.first_stage_model.decoder.middle[0].residual[0], _Fused):
                raise RuntimeError("ComfyUI has not applied the patches")
        elif kind == "subclass":
            made.__class__ = OtherVAE
        elif kind == "method":
            made.decode = lambda *_, **__: torch.zeros(1)
        elif kind == "weights":
            name = "decoder.head.2.weight"
            weight = made.first_stage_model.state_dict()[name]
            made.patcher.add_patches({name: (torch.ones_like(weight),)})
        elif kind == "scaled":
            made.process_output = lambda image: image.add_(1).mul_(127.5).clamp_(0, 255)
            made.process_input = lambda image: image / 127.5 - 1
        elif kind == "disguised":
            return (_Disguised(vae),)
        return (made,)


class _Fused(torch.nn.Module):
    """Norm and activation in one module, under another name of its weight."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.weight = norm.gamma

    def forward(self, x):
        return torch.nn.functional.silu(self.norm(x))


class OtherVAE(comfy.sd.VAE):
    def decode(self, *_, **__):
        return torch.zeros(1)

    def extra(self):
        return "extra"


class _Disguised:
    """What another pack has written itself: it answers as a VAE, and is none."""

    def __init__(self, vae):
        self._vae = vae

    def __getattr__(self, name):
        return getattr(self._vae, name)


class ProbeExtra(_Probe):
    """What `extra()` of a VAE object answers."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def probe(self, vae):
        return {"ui": {"answer": [vae.extra()]}}


class ProbeExpand:
    """A node that becomes another one, core's VAE Decode, when it runs."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "expand"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "samples": ("LATENT",)}}

    def expand(self, vae, samples):
        graph = GraphBuilder()
        decode = graph.node("VAEDecode", vae=vae, samples=samples)
        return {"result": (decode.out(0),), "expand": graph.finalize()}


class ProbeCopies(_Probe):
    """Our packed copies of weights: [identity, dtype, a VAE is alive, loaded] of each.

    marks: the number that this node left among the kernels prepared for each, when it first saw
    them; a new number where they have been dropped since.
    """

    numbers = itertools.count()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"salt": ("INT", {"min": 0, "max": 1 << 30})}}

    def probe(self, salt):
        gc.collect()
        (module,) = (m for name, m in sys.modules.items() if name.endswith(".nodes.packed"))
        found = [
            [id(copy.wan), str(key.dtype), copy.is_wanted, copy.is_loaded]
            for key, copy in module.COPIES._copies.items()
        ]
        prepared = [copy.wan.model.prepared for copy in module.COPIES._copies.values()]
        marks = [kernels.setdefault("probe", next(self.numbers)) for kernels in prepared]
        return {"ui": {"copies": found, "marks": marks, "collects": [gc.isenabled()]}}


class ProbeAssumed(_Probe):
    """Whether the copy that a run assumes is right: as the weights are, and after others have
    changed them and looked at them twice."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def probe(self, vae):
        (module,) = (m for name, m in sys.modules.items() if name.endswith(".nodes.packed"))
        copies = module.COPIES
        for _ in range(2):
            copies.get(vae, "auto")
        assumed = copies.assumed(vae, "auto")
        right = [copies.is_right(vae, assumed)]
        with torch.inference_mode():
            for parameter in vae.first_stage_model.parameters():
                parameter.mul_(1.5)
        for _ in range(2):
            new = copies.get(vae, "auto")
        right += [copies.is_right(vae, assumed), copies.is_right(vae, new)]
        return {"ui": {"right": right}}


# For each collection of garbage, whether a run of ours was computing.
_COLLECTED: collections.deque[bool] = collections.deque()


class ProbeCollections:
    """Passes a VAE on, and makes the next node collect garbage often, if it may."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "probe"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "salt": ("INT", {"min": 0, "max": 1 << 30})}}

    @staticmethod
    def note(phase, info):
        frame = sys._getframe()
        while frame is not None and not frame.f_globals["__name__"].endswith(".runs.run"):
            frame = frame.f_back
        if phase == "start":
            _COLLECTED.append(frame is not None)

    def probe(self, vae, salt):
        _COLLECTED.clear()
        gc.callbacks.append(self.note)
        gc.set_threshold(20)
        return (vae,)


class ProbeCollected(_Probe):
    """How many collections there were while a run computed, and how many in all."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    def probe(self, image):
        gc.set_threshold(700, 10, 10)
        gc.callbacks.remove(ProbeCollections.note)
        return {"ui": {"while_computing": [sum(_COLLECTED)], "all": [len(_COLLECTED)]}}


class ProbeWorkersCounted(_Probe):
    """Whether ComfyUI is asked for room: for workers that run and hold more than is free, that need
    no more than is free, and that have ended."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "other": ("IMAGE",)}}

    def probe(self, image, other):
        (module,) = (m for name, m in sys.modules.items() if name.endswith(".nodes.shards"))
        pools, entries = module.POOLS, model_management.current_loaded_models
        patcher = pools._patcher

        def is_asked(weights_bytes):
            entries.sort(key=lambda entry: entry.model is patcher)  # what is asked for comes first
            pools.count(patcher.load_device, weights_bytes, 1)
            return entries[0].model is patcher

        held = patcher.size
        asked = [is_asked(1 << 60), is_asked(held)]
        pools._pool.close()
        return {"ui": {"models": [len(entries)], "asked": [*asked, is_asked(held)]}}


class ProbeGiveBack(_Probe):
    """Gives back `mib` of memory through our `ComfyMemory`, as a run that has too little does, once
    `image` and `before` are made.

    The classes of the models that ComfyUI holds before and after, and what `held` names.
    """

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {"min": 0, "max": 1 << 40})
        images = {"image": ("IMAGE",), "before": ("IMAGE",)}
        return {"required": {"mib": number, **images, "salt": number}}

    def probe(self, mib, image, before, salt):
        (module,) = (m for name, m in sys.modules.items() if name.endswith(".nodes.packed"))
        (copy, *_) = reversed(module.COPIES._copies.values())
        memory, manager = copy.memory, module.model_management

        def models():
            return [type(m.model.model).__name__ for m in manager.current_loaded_models]

        before, held, free = models(), memory.held(), memory.free_bytes()
        memory.give_back(mib << 20)
        found = {"before": before, "after": models(), "held": [*held], "bytes": [*held.values()]}
        return {"ui": {**found, "free": [free], "ours": [type(copy.wan.model).__name__]}}


class ProbeReady(_Probe):
    """Which thread got the process ready for its first decode, and whether it has ended."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"salt": ("INT", {"min": 0, "max": 1 << 40})}}

    def probe(self, salt):
        (module,) = (m for name, m in sys.modules.items() if name.endswith(".nodes.ahead"))
        thread = module.READINESS._thread
        if thread is None:
            return {"ui": {"threads": []}}
        thread.join(60)
        return {"ui": {"threads": [id(thread)], "alive": [thread.is_alive()]}}


# Functions by file and name, of what a run may do; of C functions the name alone.
COUNTED = {
    ("model_management.py", "get_free_memory"): "asks for free memory",
    ("model_management.py", "load_models_gpu"): "asks ComfyUI to load or free",
    ("fingerprint.py", "fingerprint"): "fingerprints",
    ("fingerprint.py", "Look.is_still_true"): "looks at all weights",
    ("checkpoint.py", "canonical_state_dict"): "copies of all weights",
    ("choose.py", "choose"): "plans",
    ("cache.py", "ProofCache._parsed"): "reads of proofs",
    ("program.py", "build"): "builds of kernels",
    ("device.py", "host_free_bytes"): "asks for free host memory",
    ("reports.py", "Reporter.send"): "reports sent",
    ("report.py", "DecodeReport.as_dict"): "reports made",
    ("subprocess.py", "Popen.__init__"): "processes",
    ("threading.py", "Thread.start"): "threads",
}
COUNTED_IN_C = {"openssl_sha256": "hashes", "sha256": "hashes"}


class ProbeCounts(_Probe):
    """Decodes with our node, and counts what the third run does, beside the arithmetic."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",)}}

    def probe(self, samples, vae):
        (module,) = (m for name, m in sys.modules.items() if name.endswith(".nodes.decode"))
        hidden = types.SimpleNamespace(unique_id="counted", dynprompt=None, extra_pnginfo=None)
        counted = type("Counted", (module.WanVAEDecode,), {"hidden": hidden})
        for _ in range(2):
            counted.execute(samples, vae)
        counts = collections.Counter()

        def note(frame, event, called):
            if event == "call":
                code = frame.f_code
                what = COUNTED.get((os.path.basename(code.co_filename), code.co_qualname))
            else:
                what = COUNTED_IN_C.get(called.__name__) if event == "c_call" else None
            if what is not None:
                counts[what] += 1

        sys.setprofile(note)
        try:
            counted.execute(samples, vae)
        finally:
            sys.setprofile(None)
        return {"ui": {"counts": [dict(counts)]}}


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        ProbeCompare,
        ProbeGiveBack,
        ProbeCounts,
        ProbeReady,
        ProbeConditioning,
        ProbeClip,
        ProbeMask,
        ProbeSameVAE,
        ProbePatchedVAE,
        ProbeExtra,
        ProbeExpand,
        ProbeCollected,
        ProbeCollections,
        ProbeCopies,
        ProbeAssumed,
        ProbeWorkersCounted,
    )
}

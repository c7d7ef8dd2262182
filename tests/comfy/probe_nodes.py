"""Nodes that exist only in the test server: they make odd inputs and look at outputs.

Copied into the server's custom_nodes as a pack of its own; not part of the pack under test.
"""

import copy
import gc
import types

import comfy.latent_formats
import comfy.ldm.wan.vae2_2
import comfy.model_management as model_management
import comfy.model_patcher
import comfy.nested_tensor
import comfy.utils
import numpy as np
import torch
from safetensors.torch import load_file

import nodes


def _facts(tensor):
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "device": str(tensor.device)}


class _Probe:
    RETURN_TYPES = ()
    FUNCTION = "probe"
    OUTPUT_NODE = True
    CATEGORY = "probe"


class ProbeCompareImages(_Probe):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("IMAGE",), "b": ("IMAGE",)}}

    def probe(self, a, b):
        difference = float((a.float() - b.float()).abs().max()) if a.shape == b.shape else None
        spread = float(b.float().std())
        return {
            "ui": {
                "a": [_facts(a)],
                "b": [_facts(b)],
                "difference": [difference],
                "spread": [spread],
            }
        }


class ProbeCompareLatents(ProbeCompareImages):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("LATENT",), "b": ("LATENT",)}}

    def probe(self, a, b):
        return super().probe(a["samples"], b["samples"])


class ProbeSink(_Probe):
    """Makes nodes without outputs of their own run; `salt` keeps the cache from answering."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def probe(self, value):
        return {"ui": {"shape": [list(getattr(value, "shape", ()))]}}


# The formats of latents of Wan 2.1 and Wan 2.2, by their channels.
_FORMATS = {16: comfy.latent_formats.Wan21, 48: comfy.latent_formats.Wan22}


class ProbeHeld:
    """The latent, once somebody has opened the FIFO at `path` for writing and closed it.

    after: what is to have run before.
    """

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "hold"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"samples": ("LATENT",), "path": ("STRING", {})},
            "optional": {"after": ("IMAGE",)},
        }

    def hold(self, samples, path, after=None):
        with open(path, "rb") as fifo:
            fifo.read()
        return (samples,)


class ProbeLatent:
    """A latent of any shape from a seed. `kind`: plain, nested, image (4-D), channels_last, nan;
    normalised (not with the statistics of a real one), flat (3-D), and what is no latent at all:
    none, keyless, unfilled."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {"default": 1, "min": 0, "max": 1 << 30})
        names = ("batch", "channels", "frames", "height", "width", "seed")
        return {"required": {**{name: number for name in names}, "kind": ("STRING", {})}}

    def make(self, batch, channels, frames, height, width, seed, kind):
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(batch, channels, frames, height, width, generator=generator)
        # With the statistics of a real one, as a sampler gives it.
        if channels in _FORMATS and kind != "normalised":
            latent = _FORMATS[channels]().process_out(latent)
        if kind == "nested":
            audio = torch.zeros(batch, 8, 5)
            latent = comfy.nested_tensor.NestedTensor((latent, audio))
        elif kind == "image":
            latent = latent[:, :, 0]
        elif kind == "channels_last":
            latent = latent.contiguous(memory_format=torch.channels_last_3d)
        elif kind == "nan":
            latent[0, 0, -1, 0, 0] = float("nan")
        elif kind == "flat":
            latent = latent[0, :, 0]
        elif kind == "unfilled":
            latent = None
        return ({"none": None, "keyless": {}}.get(kind, {"samples": latent}),)


class ProbeChoice:
    """Any word as the value of a combo: a link is not held against the list of choices."""

    RETURN_TYPES = ("COMBO",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("STRING", {})}}

    def make(self, value):
        return (value,)


class ProbeFrames:
    """Random frames as IMAGE."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {"default": 1, "min": 0, "max": 1 << 30})
        return {"required": {n: number for n in ("frames", "height", "width", "channels", "seed")}}

    def make(self, frames, height, width, channels, seed):
        generator = torch.Generator().manual_seed(seed)
        return (torch.rand(frames, height, width, channels, generator=generator),)


class ProbeSound:
    """A tone of `seconds` as AUDIO."""

    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": ("FLOAT", {}), "rate": ("INT", {"max": 1 << 20})}}

    def make(self, seconds, rate):
        time = torch.arange(int(seconds * rate)) / rate
        return ({"waveform": (time * 2764.6).sin().expand(1, 2, -1) / 2, "sample_rate": rate},)


class ProbeOddSound:
    """What is no AUDIO, or a broken one. `kind`: text, empty, rateless, fast, whole, nan, flat;
    or a right one whose rate is a number of NumPy: numpy."""

    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": ("STRING", {})}}

    def make(self, kind):
        samples = torch.zeros(1, 2, 8000)
        made = {
            "text": "a song",
            "empty": {},
            "rateless": {"waveform": samples, "sample_rate": None},
            "fast": {"waveform": samples, "sample_rate": 2**40},
            "whole": {"waveform": samples.to(torch.int16), "sample_rate": 8000},
            "nan": {"waveform": samples / 0, "sample_rate": 8000},
            "flat": {"waveform": samples[0], "sample_rate": 8000},
            "numpy": {"waveform": samples, "sample_rate": np.int64(8000)},
        }
        return (made[kind],)


class ProbeVideo(_Probe):
    """What a VIDEO says of itself, and the size of its stream."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"video": ("VIDEO",)}}

    def probe(self, video):
        source = video.get_stream_source()
        return {
            "ui": {
                "kind": [type(video).__name__],
                "dimensions": [list(video.get_dimensions())],
                "frames": [video.get_frame_count()],
                "duration": [video.get_duration()],
                "rate": [float(video.get_frame_rate())],
                "container": [video.get_container_format()],
                "bytes": [len(source.getvalue())],
            }
        }


class ProbeVAEWeights:
    """The same VAE object with its weights changed in place, as other packs leave it.

    `kind`: a memory format, a dtype, or what a merge does: scaled, one_channel, negative. `after`
    is there to come after.
    """

    RETURN_TYPES = ("VAE",)
    FUNCTION = "change"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"vae": ("VAE",), "kind": ("STRING", {})},
            "optional": {"after": ("IMAGE",)},
        }

    def change(self, vae, kind, after=None):
        if kind == "one_channel":
            vae.first_stage_model.decoder.conv1.weight.data[3].mul_(-3)
        for parameter in vae.first_stage_model.parameters():
            if kind == "channels_last_3d" and parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
            elif kind in ("float16", "bfloat16"):
                parameter.data = parameter.data.to(getattr(torch, kind))
            elif kind == "negative":  # without a change of what lies in memory
                parameter.data = torch._neg_view(parameter.data)
            elif kind == "scaled":
                parameter.data.mul_(1.1)
        return (vae,)


class ProbeBrokenVAE:
    """A VAE object whose weights cannot be had, with an error that is not ours."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def make(self, vae):
        def get_sd():
            raise ZeroDivisionError("first line\nsecond line")

        made = copy.copy(vae)
        made.get_sd = get_sd
        return (made,)


class ProbeForeignVAE:
    """A VAE object of another model, quick enough for a test: it scales the numbers it is given."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def make(self, vae):
        made = copy.copy(vae)
        made.first_stage_model = torch.nn.Linear(2, 2)
        made.decode = lambda latent: (latent[:, :3] / 8 + 0.5).clamp(0, 1).movedim(1, -1)
        made.encode = lambda pixels: pixels.movedim(-1, 1) * 8 - 4
        return (made,)


class ProbeOddVAE:
    """A VAE object of another kind. `kind`: sound, whose decode gives samples; alpha, pictures of
    four channels; voxels; hooked, a Wan VAE of which another pack changed two modules."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "kind": ("STRING", {})}}

    def make(self, vae, kind):
        made = copy.copy(vae)
        if kind == "hooked":
            made.first_stage_model = copy.deepcopy(vae.first_stage_model)
            decoder = made.first_stage_model.decoder
            decoder.register_forward_hook(lambda module, inputs, output: output * 0)
            decoder.conv1.forward = lambda x, cache_x=None: x * 0
            return (made,)
        made.first_stage_model = torch.nn.Linear(2, 2)
        shape = {"sound": (1, 44100, 2), "voxels": (1, 9, 9, 9), "alpha": (5, 32, 48, 4)}[kind]
        made.decode = lambda latent: torch.zeros(shape)
        return (made,)


class ProbeWan22VAE:
    """Core's own Wan 2.2 model in a narrow width; core's loader knows only the full one (2.8 GB).

    A VAE object of core carries it, so that core's VAE Decode can be the reference.
    """

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def make(self, vae):
        generator = torch.Generator().manual_seed(0)
        made = copy.copy(vae)
        with torch.inference_mode(False), torch.no_grad():
            model = comfy.ldm.wan.vae2_2.WanVAE(
                dim=16,
                dec_dim=32,
                z_dim=48,
                dim_mult=[1, 2, 4, 4],
                num_res_blocks=2,
                attn_scales=[],
                temperal_downsample=[False, True, True],
                dropout=0.0,
            ).eval()
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                gain = 1.0 if name.endswith("gamma") else 0.0
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and not gain else 0.1
                parameter.copy_(gain + scale * noise)
        made.first_stage_model = model
        made.latent_channels = 48
        made.patcher = comfy.model_patcher.ModelPatcher(model, vae.device, torch.device("cpu"))
        made.upscale_ratio = made.downscale_ratio = (lambda frames: frames, 16, 16)
        return (made,)


class ProbeFileVAE:
    """A VAE object whose weights are those of a file, of which core's loader may know nothing."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "file": ("STRING", {"default": ""})}}

    def make(self, vae, file):
        made = copy.copy(vae)
        with torch.inference_mode(False), torch.no_grad():
            model = torch.nn.Module()
            for key, value in load_file(file).items():
                *path, name = key.split(".")
                module = model
                for part in path:
                    if part not in dict(module.named_children()):
                        module.add_module(part, torch.nn.Module())
                    module = module.get_submodule(part)
                module.register_parameter(name, torch.nn.Parameter(value))
        made.first_stage_model = model
        made.patcher = comfy.model_patcher.ModelPatcher(model, vae.device, torch.device("cpu"))
        made.output_channels = model.encoder.conv1.weight.shape[1]
        made.pad_channel_value = 1.0
        return (made,)


class ProbeMalformed(_Probe):
    """Our nodes with every malformed thing in `file`: {case: (kind, thing)}, a pickle of the test.

    The kinds: "vae" is a state dict of a VAE object, "file" a path that core's loader reads first,
    "latent" a LATENT, "image" an IMAGE. Shows of each case "done", "core" for what core's own
    loader refuses, or the name of the error, whether it is one of ours, and its message.
    """

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "file": ("STRING", {"default": ""})}}

    def probe(self, vae, file):
        cases = torch.load(file, weights_only=False)
        found = {case: self.outcome(vae, *given) for case, given in cases.items()}
        return {"ui": {"found": [found]}}

    def outcome(self, vae, kind, thing):
        if kind == "file":
            try:
                kind, thing = "vae", comfy.utils.load_torch_file(thing, safe_load=True)
            except Exception:
                return ["core", True, ""]
        try:
            if kind == "latent":
                self.node("WanVAEDecode").execute(thing, vae)
            elif kind == "image":
                self.node("WanVAEEncode").execute(thing, vae)
            else:
                made = copy.copy(vae)
                made.get_sd = lambda: thing
                # The others hand a VAE that is no Wan VAE to ComfyUI.
                self.node("WanVAEInspect").execute(made)
        except Exception as error:
            ours = "WanVAEError" in [cls.__name__ for cls in type(error).__mro__]
            return [type(error).__name__, ours, str(error)]
        return ["done", True, ""]

    def node(self, name):
        hidden = types.SimpleNamespace(unique_id=None, dynprompt=None, extra_pnginfo=None)
        return type(name, (nodes.NODE_CLASS_MAPPINGS[name],), {"hidden": hidden})


class ProbeMemory(_Probe):
    """Bytes of all live tensors, and how many models ComfyUI holds."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"salt": ("INT", {"min": 0, "max": 1 << 30})}}

    def probe(self, salt):
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        models = [type(m.model.model).__name__ for m in model_management.current_loaded_models]
        return {"ui": {"tensor_bytes": [sum(storages.values())], "models": models}}


class ProbeUnload(_Probe):
    """What ComfyUI does under memory pressure: every model goes."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)

    def probe(self, image):
        model_management.unload_all_models()
        left = [type(m.model.model).__name__ for m in model_management.current_loaded_models]
        return {"ui": {"left": left}, "result": (image,)}


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        ProbeCompareImages,
        ProbeCompareLatents,
        ProbeSink,
        ProbeHeld,
        ProbeLatent,
        ProbeChoice,
        ProbeFrames,
        ProbeSound,
        ProbeOddSound,
        ProbeVideo,
        ProbeVAEWeights,
        ProbeBrokenVAE,
        ProbeForeignVAE,
        ProbeOddVAE,
        ProbeWan22VAE,
        ProbeFileVAE,
        ProbeMalformed,
        ProbeMemory,
        ProbeUnload,
    )
}

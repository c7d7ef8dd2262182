"""The parts of `wan-vae bench` beside the comparison, in words for its help."""

from __future__ import annotations

OTHER_PARTS = {
    "ranks": "one decode over several devices: correct, timed, with faults (also --ranks 1,2)",
    "faults": "faults planted in decodes over several devices, counted (--rounds 20)",
    "encode": "the encoder beside those of diffusers and ComfyUI's core; --layers: each layer",
    "scaling": "a sharded decode on more GPUs, emulated on one; --model: calculated",
    "predictions": "predicted times on cards that nobody measured: a model (no GPU)",
    "profile": "which kernels a chunk takes, of the whole picture and of a shard",
    "kernels": "our kernels by configuration, next to the library's (a GPU)",
    "forms": "convolutions without cuDNN, by form, next to the library's (a GPU)",
    "winograd": "errors of Winograd F(4,3) in float16, by its points (no GPU)",
    "resources": "registers and shared memory of our kernels, compiled for any card (no GPU)",
    "nodes": "our nodes in a running ComfyUI (COMFYUI_PATH): time and memory",
    "small": "IMAGE and a stream of frames on a card with little memory (a GPU)",
    "video": "a latent to an mp4, beside x264 alone and an IMAGE that is saved",
    "start": "where the seconds of a process's first decode go, phase by phase",
    "host": "what fresh host memory costs a copy from the GPU",
}


def other_parts() -> str:
    """The lines for the end of the help."""
    lines = [f"  wan-vae bench {name:<11} {text}" for name, text in OTHER_PARTS.items()]
    return "\n".join(["other parts, each with a --help of its own:", *lines])

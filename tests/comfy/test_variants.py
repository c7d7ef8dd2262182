"""VAEs with alpha, with a grey head, that double the picture, of images only: through our nodes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.comfy.graphs import latent, load_vae, node
from tests.conftest import random_state
from wan_vae.config import qwen21, wan21

pytestmark = pytest.mark.comfy

SMALL = wan21(dim=8)
# The VAE, latent frames, and of 8 x 12 latent pixels the shape of the IMAGE.
VARIANTS = {
    "alpha": (replace(SMALL, colours=4, decoder_colours=4), 2, [5, 64, 96, 4]),
    "doubled": (replace(SMALL, decoder_patch_size=2), 2, [5, 128, 192, 3]),
    "grey": (replace(SMALL, decoder_colours=1), 2, [5, 64, 96, 3]),
    "pruned": (wan21(dim=16, decoder_dim=8), 2, [5, 64, 96, 3]),
    "qwen-image-2.1": (qwen21(dim=8, decoder_dim=8), 1, [1, 128, 192, 4]),
}


GOOD = random_state(SMALL)
WEIGHT = "decoder.middle.0.residual.2.weight"


def without_encoder_channels() -> dict[str, torch.Tensor]:
    return GOOD | {"encoder.conv1.weight": torch.ones(8, 2, 3, 3, 3)}


# Weights that a VAE object may hold, and words about them: of an error of this type, or of the note
# that "another" VAE is ComfyUI's to use.
MALFORMED = {
    "nothing": ({"encoder.conv1.weight": torch.ones(8, 3)}, "another", "not a Wan VAE"),
    "SeedVR2": (
        {"decoder.up_blocks.0.upsamplers.0.upscale_conv.weight": torch.ones(2, 2)},
        "another", "this is a SeedVR2 VAE",
    ),
    "Flux": (
        {"decoder.conv_in.weight": torch.ones(8, 16, 3, 3)}, "another", "this is a Flux",
    ),
    "five outputs": (
        GOOD | {"decoder.head.2.weight": torch.ones(5, 8, 3, 3, 3)},
        "another", "5 outputs, expected",
    ),
    "two inputs": (without_encoder_channels(), "another", "2 inputs, expected 3 or 4"),
    "a weight too few": (
        {k: v for k, v in GOOD.items() if k != WEIGHT}, "CheckpointError", f"missing {WEIGHT}",
    ),
    "a weight of another shape": (
        GOOD | {WEIGHT: torch.ones(3, 3)}, "CheckpointError", "wrong shape",
    ),
    "scales": (
        GOOD | {"decoder.conv1.scale_weight": torch.ones(1)}, "CheckpointError", "scaled float8",
    ),
    "NaN": (
        GOOD | {WEIGHT: torch.full_like(GOOD[WEIGHT], float("nan"))},
        "CheckpointError", "NaN or inf",
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("consumer", ["WanVAEEncode", "WanVAEAccelerate"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_weights_are_a_typed_error_of_every_node(comfy, name, consumer):
    state, kind, words = MALFORMED[name]
    file = comfy.base / f"bad_{list(MALFORMED).index(name)}.safetensors"
    inputs = {"vae": ["1", 0]}
    # What makes a VAE object of the file asks for it.
    save_file(state if "encoder.conv1.weight" in state else state | EXTRA, file)
    prompt = {
        "0": load_vae(),
        "1": node("ProbeFileVAE", vae=["0", 0], file=str(file)),
        "7": node("ProbeFrames", frames=1, height=32, width=32, channels=3, seed=1),
    }
    if consumer == "WanVAEEncode":
        inputs["pixels"] = ["7", 0]
    prompt |= {"3": node(consumer, **inputs), "5": node("ProbeSink", value=["3", 0])}
    run = comfy.run(prompt)
    if kind == "another" and consumer == "WanVAEAccelerate":
        assert run.error is None
        (note,) = run.report("3")["fallbacks"]
        assert words in note and "goes on as it came" in note
        return
    assert run.error is not None
    message = run.error["exception_message"]
    if kind == "another":  # ComfyUI's own code was asked, and the probe's network has none
        assert "'Module' object has no attribute 'encode'" in message
        return
    assert run.error["exception_type"].endswith(kind)
    assert words in message
    assert message.strip().count("\n") == 0


EXTRA = {"encoder.conv1.weight": torch.ones(8, 3, 3, 3, 3)}


@pytest.mark.parametrize("name", VARIANTS)
def test_our_nodes_give_the_size_and_the_colours_of_the_vae(comfy, name):
    config, frames, shape = VARIANTS[name]
    file = comfy.base / f"{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"
    state = random_state(config)
    if config.image_only:
        state = {k: v[:, :, -1:].contiguous() if v.ndim == 5 else v for k, v in state.items()}
    save_file(state, file)
    samples = latent(channels=config.z_dim, frames=frames, seed=77)
    side = 2 * config.spatial_factor
    run = comfy.run(
        {
            "0": load_vae(),
            "1": node("ProbeFileVAE", vae=["0", 0], file=str(file)),
            "2": samples,
            "3": node("WanVAEDecode", vae=["1", 0], samples=["2", 0]),
            "4": node("WanVAEAccelerate", vae=["1", 0]),
            "5": node("VAEDecode", vae=["4", 0], samples=["2", 0]),
            "6": node("ProbeCompareImages", a=["3", 0], b=["5", 0]),
            "7": node("ProbeFrames", frames=5, height=side, width=side, channels=3, seed=1),
            "8": node("WanVAEEncode", vae=["1", 0], pixels=["7", 0]),
            "9": node("VAEEncode", vae=["4", 0], pixels=["7", 0]),
            "10": node("ProbeCompareLatents", a=["8", 0], b=["9", 0]),
            "11": node(
                "WanVAEDecodeToVideo",
                vae=["1", 0],
                samples=["2", 0],
                fps=16.0,
                filename_prefix=f"video/{file.stem}",
            ),
            "12": node("WanVAECreateVideo", vae=["1", 0], samples=["2", 0], fps=16.0),
            "13": node("GetVideoComponents", video=["12", 0]),
            "14": node("ProbeSink", value=["13", 0]),
            "15": node(
                "SaveVideo",
                video=["12", 0],
                filename_prefix=f"video/{file.stem}_lazy",
                format="auto",
                codec="auto",
            ),
        }
    )
    assert run.error is None, run.error
    image = run.outputs["6"]
    assert image["a"][0]["shape"] == image["b"][0]["shape"] == shape
    assert image["difference"] == [0.0] and image["spread"][0] > 0.01
    assert run.outputs["14"]["shape"] == [[*shape[:3], 3]], "no node takes a VIDEO of four colours"
    coded = run.outputs["10"]
    # Five images of a VAE of images, or one video of five frames.
    batch, length = (5, 1) if config.image_only else (1, 2)
    assert coded["a"][0]["shape"] == [batch, config.z_dim, length, 2, 2]
    assert coded["difference"] == [0.0]
    report = run.report("3")
    assert report["pixel_shape"][3:] == shape[1:3]
    assert report["config"]["decoded_factor"] == shape[1] // 8

"""VAEs with alpha, with a grey head, that double the picture, of images only: through our nodes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
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
        }
    )
    assert run.error is None, run.error
    image = run.outputs["6"]
    assert image["a"][0]["shape"] == image["b"][0]["shape"] == shape
    assert image["difference"] == [0.0] and image["spread"][0] > 0.01
    coded = run.outputs["10"]
    # Five images of a VAE of images, or one video of five frames.
    batch, length = (5, 1) if config.image_only else (1, 2)
    assert coded["a"][0]["shape"] == [batch, config.z_dim, length, 2, 2]
    assert coded["difference"] == [0.0]
    report = run.report("3")
    assert report["pixel_shape"][3:] == shape[1:3]
    assert report["config"]["decoded_factor"] == shape[1] // 8

"""The miniature VAE that the repository ships, through ComfyUI's own Load VAE and Load Latent."""

import shutil
from pathlib import Path

import pytest

from tests.comfy.graphs import load_vae, node

pytestmark = pytest.mark.comfy

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MINI = "wan_vae_mini.safetensors"
SAMPLES = sorted(path.name for path in (EXAMPLES / "latents").iterdir())


@pytest.fixture(scope="module", autouse=True)
def shipped_files(comfy):
    shutil.copyfile(EXAMPLES / MINI, comfy.base / "models" / "vae" / MINI)
    for name in SAMPLES:
        shutil.copyfile(EXAMPLES / "latents" / name, comfy.base / "input" / name)


# The videos take a minute and more; a short one is decoded below.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if "image" in n else pytest.mark.full) for n in SAMPLES]
)
def test_samples_decode_as_core_decodes_them(comfy, name):
    run = comfy.run(
        {
            "1": load_vae(MINI),
            "2": node("LoadLatent", latent=name),
            "3": node("WanVAEDecode", vae=["1", 0], samples=["2", 0]),
            "4": node("VAEDecode", vae=["1", 0], samples=["2", 0]),
            "5": node("ProbeCompareImages", a=["3", 0], b=["4", 0]),
        }
    )
    assert run.error is None, run.error
    found = run.outputs["5"]
    assert found["a"] == found["b"]
    assert found["a"][0]["dtype"] == "torch.float32"
    assert found["difference"][0] < 1e-4
    assert found["spread"][0] > 0.1, "a picture, not a flat grey"


@pytest.mark.parametrize(
    "frames", [1, 6, *(pytest.param(count, marks=pytest.mark.full) for count in (5, 8))]
)
def test_frames_encode_as_core_encodes_them_and_come_back(comfy, frames):
    """Frame counts that are not 4n + 1 lose the frames past it, as in core."""
    run = comfy.run(
        {
            "1": load_vae(MINI),
            "2": node("ProbeFrames", frames=frames, height=72, width=88, channels=3, seed=frames),
            "3": node("WanVAEEncode", vae=["1", 0], pixels=["2", 0]),
            "4": node("VAEEncode", vae=["1", 0], pixels=["2", 0]),
            "5": node("ProbeCompareLatents", a=["3", 0], b=["4", 0]),
            "6": node("WanVAEDecode", vae=["1", 0], samples=["3", 0]),
            "7": node("VAEDecode", vae=["1", 0], samples=["4", 0]),
            "8": node("ProbeCompareImages", a=["6", 0], b=["7", 0]),
        }
    )
    assert run.error is None, run.error
    for compared, bound in (("5", 1e-4), ("8", 1e-4)):
        found = run.outputs[compared]
        assert found["a"] == found["b"]
        assert found["difference"][0] < bound * max(1.0, found["spread"][0])
    assert run.outputs["8"]["a"][0]["shape"] == [4 * ((frames - 1) // 4) + 1, 72, 88, 3]

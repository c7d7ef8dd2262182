"""ComfyUI's own flags for the VAE's number format decide ours."""

import pytest

from tests.comfy import graphs
from tests.comfy.graphs import decode_and_compare, latent, node
from tests.comfy.server import Comfy
from tests.comfy.test_other_nodes import cancelled_then_right, watched

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    ("flag", "dtype", "bound"),
    [
        pytest.param("--bf16-vae", "bfloat16", 0.1, marks=pytest.mark.full),
        ("--fp16-vae", "float16", 0.02),
    ],
)
def test_vae_precision_flags(environment, tmp_path, flag, dtype, bound):
    server = Comfy(environment, tmp_path / "comfy", flag, "--disable-mmap")
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    with server as comfy:
        # Small: a CPU computes slowly in half precision.
        prompt = decode_and_compare(latent(frames=2, height=4, width=6, seed=1))
        prompt["6"] = node("WanVAEDecode", vae=["1", 0], samples=["2", 0], precision="fp32")
        prompt["7"] = node("ProbeCompareImages", a=["3", 0], b=["6", 0])
        run = comfy.run(prompt)
        assert run.error is None, run.error
        assert run.report("3")["dtype"] == dtype
        assert run.report("6")["dtype"] == "float32", "what the node asks for wins"
        assert run.outputs["7"]["difference"][0] > 1e-5, "the two are really different formats"
        assert run.outputs["5"]["difference"][0] < bound
        assert run.outputs["5"]["a"] == run.outputs["5"]["b"]


@pytest.mark.full
def test_memory_flags(environment, tmp_path):
    """Models are unloaded when they can be, and the VAE is told where to be and in what numbers.

    --gpu-only, --lowvram and --novram cannot be had here: ComfyUI refuses them beside --cpu.
    """
    flags = ("--fp32-vae", "--cpu-vae", "--disable-smart-memory", "--preview-method", "auto")
    server = Comfy(environment, tmp_path / "comfy", *flags)
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    with server as comfy:
        for seed in (1, 2):  # the second finds the weights where the first left them
            run = comfy.run(decode_and_compare(latent(frames=2, height=4, width=6, seed=seed)))
            assert run.error is None, run.error
            assert run.report("3")["dtype"] == "float32"
            assert run.outputs["5"]["a"] == run.outputs["5"]["b"]
            assert run.outputs["5"]["difference"][0] < 1e-4
        # Where ComfyUI shows previews of a sampler, it shows the frames of a decode too.
        run = watched(comfy, 3)
        most = 1 + 4 * run.report("3")["duration_ms"] / 1e3
        assert 1 <= run.previews <= most, "four a second"
        # The bar is where the frame is that it comes with.
        places = [(m["value"], m["max"]) for m in run.of_type("progress") if m["node"] == "3"]
        assert places[0] == (1, 21) and places[-1] == (21, 21)


@pytest.mark.full
def test_a_server_without_a_cache(environment, tmp_path):
    """--cache-none: every object of a run dies with it; a second run and a cancel are as right."""
    server = Comfy(environment, tmp_path / "comfy", "--cache-none")
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    with server as comfy:
        for seed in (1, 1, 2):
            run = comfy.run(decode_and_compare(latent(frames=2, seed=seed)))
            assert run.error is None, run.error
            assert run.outputs["5"]["difference"][0] < 1e-4
        cancelled_then_right(comfy)

"""What surrounds a call, or is passed to it by mistake, changes no pixel and is said in words."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import SMALL_CONFIGS, random_state
from wan_vae import WanVAE, geometry
from wan_vae.arithmetic import own_arithmetic
from wan_vae.commands.cli import main
from wan_vae.errors import BackendError, CheckpointError, GeometryError, LatentError, OutputError
from wan_vae.io.sink import TensorSink, check_out

STATE = random_state(SMALL_CONFIGS["wan2.1"])


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE.from_state_dict(STATE, device="cpu")


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return torch.randn(1, 16, 2, 4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(vae, z) -> torch.Tensor:
    return vae.decode(z)


@pytest.fixture(params=["autocast", "float64", "float16", "meta", "gradients", "inference"])
def surroundings(request):
    """Ambient state that other code of the process may have left behind."""
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    elif request.param in ("float64", "float16"):
        torch.set_default_dtype(getattr(torch, request.param))
        yield
        torch.set_default_dtype(torch.float32)
    elif request.param == "meta":
        with torch.device("meta"):
            yield
    elif request.param == "gradients":
        with torch.enable_grad():
            yield
    else:
        with torch.inference_mode():
            yield


def test_the_callers_surroundings_change_no_bit(surroundings, z, expected):
    vae = WanVAE.from_state_dict(STATE, device="cpu")
    got = vae.decode(z)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(torch.cat(list(vae.decode_stream(z)), 2), expected)


def test_the_current_device_is_that_of_the_arithmetic(monkeypatch):
    """Triton launches on the current device, wherever the tensors are."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
    with own_arithmetic(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]


def test_an_output_of_inference_mode_is_written_there_and_refused_elsewhere(vae, z, expected):
    with torch.inference_mode():
        out = torch.empty_like(expected)
        vae.decode(z, out=out)
        assert torch.equal(out, expected)
    with pytest.raises(OutputError, match="inference_mode"):
        vae.decode(z, out=out)


def test_the_callers_autocast_does_not_round_an_encode(vae):
    pixels = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    expected = vae.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(pixels), expected)
        assert torch.is_autocast_enabled("cpu"), "and it is the caller's again afterwards"


def test_numbers_of_other_libraries_are_numbers(vae, z, expected):
    got = vae.decode(z, chunk_frames=np.int64(2))
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(vae.decode(z, chunk_frames=(np.int32(1), 1)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda vae, z: vae.decode(z.numpy()), LatentError, "a ndarray"),
        (lambda vae, z: vae.decode(None), LatentError, "a NoneType"),
        (lambda vae, z: vae.decode(z.to_sparse()), LatentError, "sparse"),
        (lambda vae, z: vae.decode(z.to(torch.float8_e4m3fn)), LatentError, "float8"),
        (lambda vae, z: vae.decode_stream({"samples": z}), LatentError, "a dict"),
        (lambda vae, z: vae.encode(np.zeros((1, 3, 1, 8, 8))), LatentError, "a ndarray"),
        (lambda vae, z: vae.decode(z, chunk_frames=1.5), GeometryError, "chunk_frames is 1.5"),
        (lambda vae, z: vae.decode(z, chunk_frames="2"), GeometryError, "whole number"),
        (lambda vae, z: vae.decode(z, chunk_frames=[1, 0.5]), GeometryError, "a chunk length"),
        (lambda vae, z: vae.decode(z, chunk_frames=True), GeometryError, "chunk_frames is True"),
        (lambda vae, z: vae.decode(z, strips=2.0), GeometryError, "strips is 2.0"),
        (lambda vae, z: vae.decode(z, strips=True), GeometryError, "strips is True"),
        (lambda vae, z: vae.decode(z, strips=np.bool_(1)), GeometryError, "whole number"),
        (lambda vae, z: vae.decode(z, strips=torch.tensor(True)), GeometryError, "whole number"),
        (lambda vae, z: vae.decode(z, out=np.empty((1, 3, 5, 32, 24))), OutputError, "ndarray"),
        (
            lambda vae, z: vae.decode(z, out=torch.empty(1, 3, 5, 1, 1).expand(1, 3, 5, 32, 24)),
            OutputError,
            "expanded view",
        ),
    ],
)
def test_mistaken_arguments_are_said_in_words(vae, z, call, error, words):
    with pytest.raises(error, match=words):
        call(vae, z)


@pytest.mark.parametrize("strips", [np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_strips_of_other_libraries_are_strips(strips):
    config = SMALL_CONFIGS["wan2.1"]
    assert geometry.strips(4, strips, config) == geometry.strips(4, 2, config)


def test_a_decode_takes_them(vae, z, expected):
    assert torch.allclose(vae.decode(z, strips=np.int64(2)), expected, atol=1e-5)


def hollow(kind: str, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape of `like`, where it can have one, without a plain block of memory."""
    if kind == "meta":
        return like.to("meta")
    if kind == "fake":
        with FakeTensorMode():
            return torch.empty(like.shape)
    if kind == "sparse":
        return like.to_sparse()
    if kind == "quantized":
        return torch.quantize_per_tensor(like, 0.1, 0, torch.qint8)
    if kind == "freed":  # as a module's weights are once their memory was given back
        freed = like.clone()
        freed.untyped_storage().resize_(0)
        return freed
    layout = torch.jagged if kind == "jagged" else torch.strided
    return torch.nested.nested_tensor(list(like), layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "kind", ["meta", "fake", "sparse", "quantized", "freed", "nested", "jagged"]
)
def test_tensors_without_plain_memory_are_refused_by_name(vae, z, expected, kind):
    """As latent, as video, as output and as weight."""
    name = "nested" if kind == "jagged" else kind
    with pytest.raises(LatentError, match=f"the latent is a {name}"):
        vae.decode(hollow(kind, z))
    with pytest.raises(LatentError, match=f"the video is a {name}"):
        vae.encode(hollow(kind, expected))
    with pytest.raises(OutputError, match=f"out is a {name}"):
        check_out(hollow(kind, expected), tuple(expected.shape))
    weight = "decoder.middle.0.residual.2.weight"
    if kind not in ("nested", "jagged"):  # they have no shape to be checked
        with pytest.raises(CheckpointError, match=f"{weight} is {kind}"):
            WanVAE.from_state_dict(STATE | {weight: hollow(kind, STATE[weight])}, device="cpu")


@pytest.mark.parametrize("state", [None, [], "vae.safetensors", {"a": None}, {1: torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(state):
    with pytest.raises(CheckpointError, match="state dict"):
        WanVAE.from_state_dict(state, device="cpu")


SHAPE = (1, 3, 5, 32, 24)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.empty(SHAPE, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.empty(SHAPE, dtype=torch.complex64), "complex64"),
        (torch.empty(SHAPE, dtype=torch.int32), "int32"),
        (torch.empty(5 * 32 * 24 * 3).as_strided(SHAPE, (1, 9, 9, 24, 1)), "share memory"),
        (torch.empty(9000).as_strided(SHAPE, (1, 2000, 400, 12, 1)), "share memory"),
        (torch.empty(1, 3, 5, 32, 1).expand(SHAPE), "expanded view"),
    ],
)
def test_an_output_that_cannot_hold_the_pixels_is_refused(out, words):
    with pytest.raises(OutputError, match=words):
        check_out(out, SHAPE)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(SHAPE, dtype=torch.bfloat16),
        torch.empty(SHAPE, dtype=torch.float64),
        torch.empty(1, 5, 32, 24, 3).permute(0, 4, 1, 2, 3),
        torch.empty(2, 6, 10, 64, 48)[1:, ::2, ::2, 32:, 5:29],
    ],
)
def test_an_output_of_any_place_in_memory_is_filled(expected, out):
    check_out(out, SHAPE)
    TensorSink(out).write(expected, 0, 0)
    assert torch.equal(out, expected.to(out.dtype))


@pytest.mark.filterwarnings("error")
def test_a_video_with_gradients_is_no_matter_for_warnings(vae):
    vae.encode(torch.zeros(1, 3, 1, 8, 8, requires_grad=True))
    vae.encode(torch.full((1, 3, 1, 8, 8), 9.0, requires_grad=True))
    assert vae.last_report.warnings[0].startswith("the video's values reach 9")


def test_a_device_without_data_is_refused():
    with pytest.raises(BackendError, match="meta"):
        WanVAE.from_state_dict(STATE, device="meta")


def test_a_file_with_two_vaes_is_not_guessed_at():
    two = {prefix + k: v for prefix in ("vae.", "model.") for k, v in STATE.items()}
    with pytest.raises(CheckpointError, match=r"2 Wan VAEs, under 'model\.', 'vae\.'"):
        WanVAE.from_state_dict(two, device="cpu")


def test_a_video_of_another_range_is_warned_of(vae):
    vae.encode(torch.full((1, 3, 1, 8, 8), 255.0))
    assert "values reach 255" in vae.last_report.warnings[0]
    vae.encode(torch.full((1, 3, 1, 8, 8), 1.2))
    assert vae.last_report.warnings == ()


def test_an_error_in_a_callback_is_the_callers_own_and_leaves_nothing_behind(vae, z, expected):
    def broken(done, total, report):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        vae.decode(z, on_progress=broken)
    assert vae.last_report.status == "failed"
    assert torch.equal(vae.decode(z), expected)


def test_a_decode_inside_a_callback_of_a_decode(vae, z, expected):
    """A preview while decoding: two runs share weights, nothing else."""
    previews = []
    got = vae.decode(
        z, chunk_frames=1, on_progress=lambda *_: previews.append(vae.decode(z[:, :, :1]))
    )
    assert torch.allclose(got, expected, atol=1e-5)
    assert len(previews) == 2
    assert torch.allclose(previews[1], expected[:, :, :1], atol=1e-5)


def test_two_latents_of_one_name_do_not_overwrite_each_other(tmp_path, capsys):
    argv = ["decode", "a/z.latent", "b/z.latent", "--vae", "v", "-o", str(tmp_path / "out")]
    assert main(argv) == 1
    assert "several latents would be written to" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    """`wan-vae inspect FILE --json | head -1`."""
    from safetensors.torch import save_file

    save_file(STATE, str(tmp_path / "v.safetensors"))
    process = subprocess.Popen(
        [sys.executable, "-m", "wan_vae", "inspect", str(tmp_path / "v.safetensors"), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()

"""What a decode leaves behind: the caller's tensors, its sink, the report, and the weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.conftest import SMALL_CONFIGS, pass_elements, random_state
from wan_vae import WanVAE
from wan_vae.errors import BackendError, DecodeMemoryError, GeometryError, LatentError, OutputError
from wan_vae.planning import choose

SHAPE = (1, 16, 3, 4, 3)


@pytest.fixture
def vae() -> WanVAE:
    return WanVAE.from_state_dict(random_state(SMALL_CONFIGS["wan2.1"]), device="cpu")


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


class Recorder:
    """A sink that writes down what is done with it."""

    needs_whole_frames = False

    def __init__(self):
        self.calls = []

    def write(self, pixels, start_frame, first_row):
        self.calls.append("write")

    def close(self):
        self.calls.append("close")

    def abort(self):
        self.calls.append("abort")


def test_a_stream_keeps_its_own_copy_of_the_latent(vae, z):
    expected = vae.decode(z, chunk_frames=1)
    stream = vae.decode_stream(z, chunk_frames=1)
    z.fill_(float("nan"))
    assert torch.equal(torch.cat(list(stream), 2), expected)


@pytest.mark.parametrize("chunk_frames", [1, 3])
@pytest.mark.parametrize("called_inside", [False, True])
def test_a_stream_may_begin_in_inference_mode_and_end_outside(
    vae, z, chunk_frames, called_inside, monkeypatch
):
    """Also in the middle of a chunk, whose features then wait for their pass."""
    monkeypatch.setattr(choose, "PASSES", (pass_elements(vae.config, SHAPE, 4),) * 2)
    expected = vae.decode(z, chunk_frames=chunk_frames)
    stream = None if called_inside else vae.decode_stream(z, chunk_frames=chunk_frames)
    with torch.inference_mode():
        stream = stream or vae.decode_stream(z, chunk_frames=chunk_frames)
        frames = [next(stream), next(stream)]
    assert [f.shape[2] for f in frames] == [1, 4]
    assert torch.equal(torch.cat([*frames, *stream], 2), expected)


def test_frames_of_a_stream_are_ordinary_tensors(vae, z):
    gain = torch.nn.Parameter(torch.ones(()))
    for frames in vae.decode_stream(z):
        frames.add_(1)
        (frames * gain).sum().backward()
    assert gain.grad.isfinite()


def test_a_vae_made_in_inference_mode_works_outside_of_it(z):
    state = random_state(SMALL_CONFIGS["wan2.1"])
    with torch.inference_mode():
        vae = WanVAE.from_state_dict(state, device="cpu")
        inside = vae.decode(z)
    assert torch.equal(vae.decode(z), inside)
    outside = vae.decode(z, memory_format="channels_last_3d")
    assert (outside - inside).norm() < 1e-5 * inside.norm()
    latent = vae.encode(inside.clone(), memory_format="channels_last_3d")
    assert latent.shape == SHAPE


def test_weights_changed_in_place_are_seen_in_every_precision(vae, z):
    before = vae.decode(z, precision="bf16")
    with torch.no_grad():
        vae.model.decoder.head["2"].bias.add_(0.5)
    after = vae.decode(z, precision="bf16")
    assert (after - before).mean() > 0.2
    # Repacking alone changes nothing that is seen.
    vae.decode(z, memory_format="channels_last_3d")
    assert torch.equal(vae.decode(z, precision="bf16"), after)


def test_weights_in_memory_that_was_taken_again_are_other_weights(vae, z):
    """Of two LoRAs that are merged one after the other, the second finds the first's memory."""
    weight = vae.model.decoder.conv1.weight
    memory = weight.numpy().copy()
    weight.data = torch.from_numpy(memory)
    vae.decode(z, precision="bf16")
    weight.data = weight.data * 2
    memory *= 3
    weight.data = torch.from_numpy(memory)
    other = WanVAE.from_state_dict(vae.model.state_dict(), device="cpu")
    assert torch.equal(vae.decode(z, precision="bf16"), other.decode(z, precision="bf16"))


def test_a_copy_and_a_pickle_begin_without_what_is_known_of_the_weights(vae, z):
    expected = vae.decode(z, precision="bf16")
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert torch.equal(other.decode(z, precision="bf16"), expected)


@pytest.mark.parametrize(
    "options", [{"chunk_frames": 0}, {"strips": 99}, {"precision": "fp8"}, {"backend": "cuda"}]
)
def test_refused_arguments_abort_the_sink_and_leave_no_old_report(vae, z, options):
    vae.decode(z)
    sink = Recorder()
    with pytest.raises((GeometryError, BackendError)):
        vae.decode(z, sink=sink, **options)
    assert sink.calls == ["abort"]
    assert vae.last_report is None or vae.last_report.status == "failed"


def test_a_refused_latent_leaves_no_report_of_the_run_before(vae, z):
    vae.decode(z)
    with pytest.raises(LatentError):
        vae.decode(z * float("nan"))
    assert vae.last_report is None
    vae.encode(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(LatentError):
        vae.encode(torch.full((1, 3, 1, 16, 16), float("nan")))
    # Its values are looked at on the way to the device: the run had begun.
    assert vae.last_report.status == "failed" and "NaN" in vae.last_report.error


def test_an_abort_that_fails_hides_nothing(vae, z):
    class Stuck(Recorder):
        def abort(self):
            raise OSError("the disk is gone")

    def on_progress(*_):
        raise ZeroDivisionError("the caller's own")

    with pytest.raises(ZeroDivisionError, match="the caller's own") as caught:
        vae.decode(z, sink=Stuck(), on_progress=on_progress)
    assert any("the disk is gone" in note for note in caught.value.__notes__)
    assert vae.last_report.status == "failed"


def test_out_and_sink_together_are_refused(vae, z):
    with pytest.raises(OutputError, match="out= and sink="):
        vae.decode(z, sink=Recorder(), out=torch.empty(1))


@pytest.mark.parametrize("chunk_frames", [0, [], [1], "all"])
def test_encode_refuses_impossible_chunks(vae, chunk_frames):
    with pytest.raises(GeometryError):
        vae.encode(torch.zeros(1, 3, 5, 16, 16), chunk_frames=chunk_frames)


@pytest.mark.parametrize("device", ["vulkan", "xpu", "hpu", "privateuseone", "meta", [], 3.5])
def test_devices_that_are_not_there_are_refused_in_words(device):
    with pytest.raises(BackendError, match="device"):
        WanVAE.from_state_dict(random_state(SMALL_CONFIGS["wan2.1"]), device=device)


def raising(fail):
    """A stand-in for `Decoder.passes`, whose first pass does `fail()`."""

    def passes(x, step, strip=None):
        yield fail()

    return passes


def test_the_cpus_way_of_running_out_of_memory_is_understood(vae, z, monkeypatch):
    """Its allocator raises a plain RuntimeError: chunks shrink, then strips, then the words."""

    def full(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
        )

    monkeypatch.setattr(vae.model.decoder, "passes", raising(full))
    with pytest.raises(DecodeMemoryError, match="out of memory on cpu"):
        vae.decode(z, chunk_frames=3)
    tried = [text.partition(":")[0] for text in vae.last_report.fallbacks]
    assert tried == [
        "chunk of 3 latent frames",
        "chunk of 2 latent frames",
        "chunk of 1 latent frame",
        "2 strips",
        "4 strips",
    ]
    monkeypatch.setattr(vae.model.encoder.conv1, "forward", full)
    with pytest.raises(DecodeMemoryError, match="encode a smaller"):
        vae.encode(torch.zeros(1, 3, 9, 24, 16), chunk_frames=3)
    assert "one latent frame a chunk and 3 strip" in vae.last_report.error
    tried = [text.partition(":")[0] for text in vae.last_report.fallbacks]
    assert tried == [
        "chunk of 3 latent frames",
        "chunk of 2 latent frames",
        "chunk of 1 latent frame",
        "2 strips",
        "3 strips",
    ]


def test_other_runtime_errors_are_not_taken_for_it(vae, z, monkeypatch):
    def broken(*_):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(vae.model.decoder, "passes", raising(broken))
    with pytest.raises(RuntimeError, match="CUDNN"):
        vae.decode(z)


def test_overflow_in_float32_does_not_advise_float32(vae, z):
    with torch.no_grad():
        vae.model.decoder.head["2"].bias.fill_(float("nan"))
    vae.decode(z)
    (warning,) = [w for w in vae.last_report.warnings if "NaN or inf" in w]
    assert "precision='fp32'" not in warning

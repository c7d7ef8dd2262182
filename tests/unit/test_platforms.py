"""What other systems and devices do differently, by stand-ins: this machine is none of them."""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import random_state
from wan_vae import device as devices
from wan_vae.commands.cli import main
from wan_vae.commands.console import is_closed_pipe
from wan_vae.commands.share import without_folders
from wan_vae.config import wan21
from wan_vae.device import free_bytes, is_out_of_memory, triton_version
from wan_vae.errors import DecodeMemoryError, OutputError
from wan_vae.io import files
from wan_vae.io.files import check_output, nearest_folder, too_long_note
from wan_vae.io.latents import load_latent, save_latent
from wan_vae.io.pixels import PixelSource
from wan_vae.kernels.cache_folder import cache_folder, write_whole
from wan_vae.kernels.cuda import driver
from wan_vae.kernels.proof.cache import ProofCache
from wan_vae.kernels.proof.prove import Verdict
from wan_vae.network.model import build_model
from wan_vae.runs.run import in_memory
from wan_vae.workers import shared
from wan_vae.workers.shared import SharedBuffer

# -- memory that runs out, in the words of each platform ---------------------------------------

SAID = [
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 37984010240 bytes. Error code 12 (Cannot allocate memory)",
    "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried "
    "to allocate 911360 bytes.",
    "std::bad_alloc",
    "bad allocation",
    "NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 29.50 GiB total capacity)",
    "MPS backend out of memory (MPS allocated: 17.21 GB, other allocations: 384.00 KB, max "
    "allowed: 18.13 GB). Tried to allocate 1.07 GB on private pool.",
    "Invalid buffer size: 19.45 GB",
    "Could not allocate tensor with 530841600 bytes. There is not enough GPU video memory "
    "available!",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "HIP error: out of memory\nHIP kernel errors might be asynchronously reported",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "XPU out of memory. Tried to allocate 1.00 GiB (GPU 0; 15.56 GiB total capacity)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "miopenStatusAllocFailed",
    "CUDA driver error: out of memory",
    "cudaErrorMemoryAllocation: out of memory",
    "HIPBLAS error: rocblas_status_memory_error when calling rocblas_gemm_ex",
    "The call failed with 0x8007000E: Not enough memory resources are available",
    "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES) -5",
]


@pytest.mark.parametrize("text", SAID, ids=lambda text: text[:30])
def test_a_run_that_does_not_fit_is_told_from_other_errors(text):
    def work() -> torch.Tensor:
        raise RuntimeError(text)

    assert is_out_of_memory(RuntimeError(text))
    with pytest.raises(DecodeMemoryError, match="chunk of 4: "):
        in_memory("chunk of 4", work)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        OSError("MPS backend out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_raised_as_they_are(error):
    def work() -> torch.Tensor:
        raise error

    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught:
        in_memory("chunk of 4", work)
    assert caught.value is error


def test_every_text_is_one_that_a_platform_says():
    """In small letters, as it is looked for; none is part of another, which would hide it."""
    texts = list(devices.OUT_OF_MEMORY_TEXTS)
    assert all(text == text.lower() for text in texts)
    for text in texts:
        assert not [other for other in texts if other != text and other in text], text


# -- dtypes that a device lacks -----------------------------------------------------------------


class NoFloat64On(TorchDispatchMode):
    """A device without float64, as MPS is one: every operation that would make it there fails."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == self.device:
            assert result.dtype != torch.float64, f"{func}: {self.device} has no float64"
        return result


@pytest.mark.parametrize("unit_range", [False, True])
def test_pixels_in_float64_are_never_that_on_the_device(unit_range):
    pixels = torch.rand(1, 3, 5, 16, 16, dtype=torch.float64)
    source = PixelSource(pixels, torch.device("meta"), torch.float32, unit_range=unit_range)
    with NoFloat64On("meta"):
        with pytest.raises(AssertionError, match="no float64"):
            pixels.to("meta")
        assert source.fetch(0, 5).dtype == torch.float32


def test_weights_in_float64_are_never_that_on_the_device():
    config = wan21(dim=8)
    state = {name: value.double() for name, value in random_state(config).items()}
    with NoFloat64On("meta"):
        model = build_model(config, state, torch.device("meta"), torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("here", "chosen"),
    [((), "cpu"), (("mps",), "mps"), (("xpu",), "xpu"), (("xpu", "mps"), "xpu")],
)
def test_without_a_device_named_the_best_one_here_is_taken(here, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in here)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in here)
    assert devices.pick_device(None).type == chosen


# -- free memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "settings", "free"),
    [
        ("native", "", 100 + 50 - 30 - 8),
        ("native", "expandable_segments:True", 100 + 50 - 30),
        ("cudaMallocAsync", "", 100 + 50 - 30),
    ],
)
def test_free_memory_of_a_cuda_device_asks_the_driver_once_or_not_at_all(
    monkeypatch, backend, settings, free
):
    asked, card = [], torch.device("cuda", 0)
    counted = {"allocated_bytes": 30, "reserved_bytes": 50, "inactive_split_bytes": 8}
    stats = {name: {"all": {"current": number}} for name, number in counted.items()}

    def driver(device):
        asked.append(device)
        return 100, 1000

    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    monkeypatch.setattr(torch.cuda, "mem_get_info", driver)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    total = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    share = [1.0]
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda device: share[0], raising=False
    )
    assert free_bytes(card) == free and asked == [card]
    assert free_bytes(card, 100) == free and free_bytes(card, 60) == free - 40 and len(asked) == 1
    # At most a tenth of the card for this process: 100, of which 30 (and pieces) are taken.
    share[0] = 0.1
    assert free_bytes(card, 100) == free - 50 and free_bytes(card, 0) == max(0, free - 100)


def test_free_memory_of_a_mac(monkeypatch):
    mps = torch.device("mps")
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12, raising=False)
    assert free_bytes(mps) == 7
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3)
    assert free_bytes(mps) == 0
    monkeypatch.delattr(torch.mps, "recommended_max_memory")
    assert free_bytes(mps) is None, "PyTorch before 2.5"


def test_free_memory_of_an_intel_card(monkeypatch):
    def refuses(device):
        raise RuntimeError("The device does not support querying the available free memory")

    xpu = torch.device("xpu", 0)
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda device: 5, raising=False)
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda device: 3, raising=False)
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda device: (10, 16), raising=False)
    assert free_bytes(xpu) == 12
    monkeypatch.setattr(torch.xpu, "mem_get_info", refuses)
    assert free_bytes(xpu) is None
    monkeypatch.delattr(torch.xpu, "mem_get_info")
    assert free_bytes(xpu) is None, "PyTorch before 2.6"


def test_nobody_knows_what_is_free_on_directml():
    assert free_bytes(torch.device("privateuseone", 0)) is None


# -- versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "version"),
    [
        ({"triton": "3.7.1"}, "3.7.1"),
        ({"triton-windows": "3.5.1.post22"}, "triton-windows 3.5.1.post22"),
        ({"pytorch-triton-rocm": "3.4.0"}, "pytorch-triton-rocm 3.4.0"),
        ({"triton": "3.3.0", "pytorch-triton-xpu": "3.4.0"}, "3.3.0, pytorch-triton-xpu 3.4.0"),
        ({}, "unknown"),
    ],
    ids=str,
)
def test_the_version_of_triton_under_every_name(installed, version):
    def version_of(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    assert triton_version(version_of) == version


# -- files --------------------------------------------------------------------------------------


def test_a_drive_that_is_not_there_is_refused(monkeypatch, tmp_path):
    assert nearest_folder(tmp_path / "a" / "b.mp4") == tmp_path
    assert nearest_folder(tmp_path / "a" / "b.mp4", lambda folder: False) is None
    monkeypatch.setattr(files, "nearest_folder", lambda path: None)
    with pytest.raises(OutputError, match=r"cannot be written: .* is not there"):
        check_output(tmp_path / "out.mp4")


def test_a_path_that_is_too_long_for_windows_is_named():
    path = PureWindowsPath("C:/") / ("x" * 200) / "out.mp4"
    assert too_long_note(path, "linux", 100) == "" == too_long_note(path, "win32")
    length = len(str(path))
    assert too_long_note(path, "win32", 259 - length) == ""
    assert f"has {length} characters" in too_long_note(path, "win32", 260 - length)


def test_the_name_of_a_partial_file_is_not_longer_than_was_counted(tmp_path):
    for stem in ("a", "b" * 100):
        target = tmp_path / f"{stem}.mp4"
        partial = files.Partial(target)
        assert len(str(partial.path)) <= len(str(target)) + files._PARTIAL_ADDS
        partial.discard()


def refuses_to_replace(*paths: object) -> None:
    """Windows, while another process reads the target."""
    raise PermissionError(errno.EACCES, "Access is denied")


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path, monkeypatch):
    write_whole(tmp_path / "new" / "kept", b"one")
    monkeypatch.setattr(os, "replace", refuses_to_replace)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "new" / "kept", b"two")
    driver._keep(tmp_path / "new" / "code.cubin", b"code")
    cache = ProofCache({"device": "here"}, tmp_path / "new")
    assert cache.verdict("key", lambda: Verdict(True)).passed
    assert "verdicts are not kept: [Errno 13]" in cache.notes[0]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["kept"]
    assert (tmp_path / "new" / "kept").read_bytes() == b"one"


def test_a_mapped_file_stays_where_it_cannot_be_removed(tmp_path, monkeypatch):
    """Windows: the last process that lets go of it removes it."""
    removals = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        removals.append(path)
        if len(removals) == 1:
            raise PermissionError(errno.EACCES, "used by another process")

    monkeypatch.setattr(shared, "sys", SimpleNamespace(platform="win32"))
    buffer = SharedBuffer.create(4096, [tmp_path])
    monkeypatch.setattr(Path, "unlink", unlink)
    kept = buffer.raw
    buffer.unlink()
    path = buffer.path
    del buffer
    assert removals == [path], "a tensor still has it"
    del kept
    assert removals == [path, path]


@pytest.mark.parametrize(
    ("error", "platform", "closed"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "linux", True),
        (OSError(errno.EINVAL, "Invalid argument"), "win32", True),
        (OSError(errno.EINVAL, "Invalid argument"), "linux", False),
        (OSError(errno.EINVAL, "Invalid argument", "file.mp4"), "win32", False),
        (OSError(errno.ENOSPC, "No space left on device"), "win32", False),
    ],
)
def test_a_reader_that_left_early(error, platform, closed):
    assert is_closed_pipe(error, platform) == closed


def test_a_user_without_a_home_folder(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("WAN_VAE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None
    assert without_folders("/srv/data/vae.safetensors: damaged") == "vae.safetensors: damaged"


# -- paths that only other systems have ------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", ["with space", "Müller's Bilder", "フォルダ", "a%20b", "semi;colon & more", "c:"]
)
def test_every_command_takes_odd_folders(folder, tmp_path, capfd):
    if sys.platform == "win32" and folder == "c:":
        pytest.skip("no name on Windows")
    place = tmp_path / folder
    place.mkdir()
    save_file(random_state(wan21(dim=8)), str(place / "vae ü.safetensors"))
    save_latent(place / "z 1.latent", torch.zeros(1, 16, 1, 2, 2))
    vae = ["--vae", str(place / "vae ü.safetensors"), "--device", "cpu"]
    video, again = place / "o ü.mp4", place / "back.latent"
    assert main(["decode", str(place / "z 1.latent"), *vae, "-o", str(video)]) == 0
    assert main(["encode", str(video), *vae, "-o", str(again)]) == 0
    assert load_latent(again).shape == (1, 16, 1, 2, 2)
    assert main(["inspect", vae[1]]) == 0


def test_a_colon_is_no_part_of_a_name_on_windows(tmp_path):
    """NTFS would write into a hidden stream of the file "10"."""
    assert files.impossible_name("10:30.mp4", "linux") is None
    assert "':'" in files.impossible_name("10:30.mp4", "win32")
    assert files.impossible_name("10-30.mp4", "win32") is None


@pytest.mark.parametrize("command", ["inspect", "decode", "encode"])
@pytest.mark.parametrize("path", [r"\\server\share\x.safetensors", r"Q:\nowhere\x.safetensors"])
def test_a_share_or_a_drive_that_is_not_there_is_an_error_of_ours(command, path, tmp_path, capfd):
    save_file(random_state(wan21(dim=8)), str(tmp_path / "v.safetensors"))
    argv = [command, path]
    if command != "inspect":
        argv += ["--vae", str(tmp_path / "v.safetensors"), "-o", str(tmp_path / "o.latent")]
        argv[-1] = str(tmp_path / ("o.mp4" if command == "decode" else "o.latent"))
    assert main(argv) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(f"wan-vae: {path}: ") or "no such file" in line

"""Wan 2.2's shortcuts give the same numbers in every memory format, and keep the format."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wan_vae import layout
from wan_vae.network.blocks import AverageShortcut, DuplicateShortcut


def plain(shortcut, x, is_first):
    """Each number where the definition puts it."""
    b, _, t, h, w = x.shape
    ft, fs, out = shortcut.factor_t, shortcut.factor_s, shortcut.out_channels
    y = torch.empty(b, out, t * ft, h * fs, w * fs, dtype=x.dtype)
    for i in range(ft):
        for j in range(fs):
            for k in range(fs):
                group = (i * fs * fs + j * fs + k) // shortcut.repeats
                part = x[:, group :: shortcut.groups]
                y[:, :, i::ft, j::fs, k::fs] = part
    return y[:, :, ft - 1 :] if is_first else y


LAST = torch.channels_last_3d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "channels, out, factor_t", [(16, 16, 2), (16, 8, 1), (32, 16, 2), (8, 8, 1), (6, 3, 1)]
)
def test_duplicates(channels, out, factor_t, dtype):
    shortcut = DuplicateShortcut(channels, out, factor_t, 2)
    x = torch.randn(2, channels, 3, 5, 4).to(dtype)
    last = x.contiguous(memory_format=LAST)
    for given in (x, last, x[:, :, 1:], last[:, :, 1:], last[:, :, :1], last[:1, :, :1]):
        for is_first in (True, False):
            step = SimpleNamespace(chunk=SimpleNamespace(is_first=is_first))
            made = shortcut(given, step)
            assert torch.equal(made, plain(shortcut, given, is_first))
            was, now = layout.detect(given[:1]), layout.detect(made[:1])
            assert (was == "channels_last_3d") == (now == "channels_last_3d")


def test_what_lies_between_words_is_moved_all_the_same():
    shortcut, step = DuplicateShortcut(16, 16, 2, 2), SimpleNamespace()
    step.chunk = SimpleNamespace(is_first=False)
    pixels = torch.randn(1 + 2 * 3 * 3 * 16).to(torch.bfloat16)
    x = pixels[1:].view(1, 2, 3, 3, 16).permute(0, 4, 1, 2, 3)
    assert torch.equal(shortcut(x, step), plain(shortcut, x, False))
    one_word = DuplicateShortcut(2, 2, 2, 2)
    x = torch.randn(1, 2, 2, 1, 1).contiguous(memory_format=LAST)
    assert torch.equal(one_word(x, step), plain(one_word, x, False))


def test_gradients_go_through():
    shortcut, step = DuplicateShortcut(16, 16, 2, 2), SimpleNamespace()
    step.chunk = SimpleNamespace(is_first=False)
    x = torch.randn(1, 16, 2, 3, 3).contiguous(memory_format=LAST).requires_grad_()
    shortcut(x, step).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 8.0))


def squares(shortcut, x):
    """The float32 sums of each group of `AvgDown3D`, term by term, rounded once."""
    ft, fs = shortcut.factor_t, shortcut.factor_s
    missing = -x.shape[2] % ft
    x = torch.cat((torch.zeros_like(x[:, :, :missing]), x), dim=2)
    y = torch.empty(x.shape[0], shortcut.out_channels, *(n // f for n, f in folds(x, ft, fs)))
    members = ft * fs * fs * x.shape[1] // shortcut.out_channels
    for channel in range(shortcut.out_channels):
        total = 0
        for member in range(channel * members, (channel + 1) * members):
            source, place = divmod(member, ft * fs * fs)
            i, j, k = place // fs**2, place // fs % fs, place % fs
            total = total + x[:, source, i::ft, j::fs, k::fs].float()
        y[:, channel] = total / members
    return y.to(x.dtype)


def folds(x, ft, fs):
    return zip(x.shape[2:], (ft, fs, fs), strict=True)


AVERAGED = [(6, 6, 1, 2), (4, 8, 2, 2), (4, 4, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels, out, factor_t, factor_s", AVERAGED)
def test_averages(channels, out, factor_t, factor_s, dtype):
    shortcut = AverageShortcut(channels, out, factor_t, factor_s)
    x = torch.randn(2, channels, 5, 4, 6).to(dtype)
    last = x.contiguous(memory_format=LAST)
    odd = torch.empty(1 + x.numel(), dtype=dtype)[1:].as_strided(last.shape, last.stride())
    for whole in (x, last, odd.copy_(last)):
        for given in (whole, whole[:1], whole[:, :, 1:], whole[:, :, 1:3], whole[:, :, :1]):
            made = shortcut(given, None)
            assert torch.equal(made, squares(shortcut, given))
            was, now = layout.detect(given[:1]), layout.detect(made[:1])
            assert (was == "channels_last_3d") == (now == "channels_last_3d")
    rows = last[:, :, :, 2:]  # of no memory format
    assert torch.equal(shortcut(rows, None), squares(shortcut, rows))


@pytest.mark.parametrize("channels, out, factor_t, factor_s", AVERAGED[:2])
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_averages_copy_nothing_but_sums_and_results(channels, out, factor_t, factor_s, frames):
    """What is written: the sums, four times; their quotient; the averages. It was also the input,
    twice where its frames are odd."""
    shortcut = AverageShortcut(channels, out, factor_t, factor_s)
    x = torch.empty(1, channels, frames, 4, 6, dtype=torch.bfloat16, device="meta")
    for given in (x, x.contiguous(memory_format=LAST)):
        with Written() as written:
            made = shortcut(given, None)
        zeros = 0 if frames % factor_t == 0 else made[:, ::2, :1].numel()
        sums = 4 * (4 * made.numel() - 4 * zeros) + 4 * zeros
        assert written.count == sums + 4 * made.numel() + made.nbytes


class Written(TorchDispatchMode):
    """Counts the bytes that operations write."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        schema = function._schema
        views = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not views and "empty" not in schema.name and made.ndim:
            self.count += made.nbytes
        return made


def test_averages_divide_their_gradients():
    for channels, out, factor_t, factor_s in AVERAGED[:2]:
        shortcut = AverageShortcut(channels, out, factor_t, factor_s)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, channels, 3, 4, 4).to(dtype).contiguous(memory_format=LAST)
            x.requires_grad_()
            shortcut(x, None).sum().backward()
            assert torch.equal(x.grad, torch.full_like(x, 0.25))

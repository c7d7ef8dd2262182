"""Wan 2.2's shortcuts give the same numbers in every memory format, and keep the format."""

from types import SimpleNamespace

import pytest
import torch

from wan_vae import layout
from wan_vae.network.blocks import DuplicateShortcut


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

"""The procedural scenes: deterministic by seed, in range, and moving."""

from __future__ import annotations

import pytest
import torch

from examples.scenes import HELD_OUT_PICTURES, TRAIN_PICTURES, Scenes

CPU = torch.device("cpu")
KINDS = ("shapes", "textures", "camera")


def picture() -> torch.Tensor:
    """A smooth coloured picture [3, 60, 90], so that no test needs scikit-image."""
    y, x = torch.meshgrid(torch.linspace(0, 9, 60), torch.linspace(0, 9, 90), indexing="ij")
    return torch.stack((x.sin(), y.cos(), (x * y / 9).sin()))


def clip(kind: str, seed: int, size=(5, 32, 48)) -> torch.Tensor:
    return getattr(Scenes(seed, CPU, [picture()]), kind)(*size)


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_clip_and_another_seed_another(kind):
    assert torch.equal(clip(kind, 1), clip(kind, 1))
    assert not torch.equal(clip(kind, 1), clip(kind, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 24, 40), (9, 40, 24), (5, 17, 25)])
def test_shape_and_range(kind, size):
    for seed in range(6):
        x = clip(kind, seed, size)
        assert x.shape == (3, *size)
        assert torch.isfinite(x).all()
        assert x.abs().max() <= 1 + 1e-5
        assert x.std() > 0.01, "a clip without content teaches nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_frames_differ_but_not_as_much_as_unrelated_clips(kind):
    nearby, unrelated = [], []
    for seed in range(6):
        x, other = clip(kind, seed), clip(kind, seed + 100)
        nearby.append((x[:, 1:] - x[:, :-1]).abs().mean().item())
        unrelated.append((x - other).abs().mean().item())
    assert min(nearby) > 1e-4
    assert sum(nearby) < 0.5 * sum(unrelated)


def test_a_batch_mixes_kinds_and_has_the_asked_shape():
    x = Scenes(0, CPU, [picture()]).clips(3, 5, 16, 24)
    assert x.shape == (3, 3, 5, 16, 24)
    assert not torch.equal(x[0], x[1])


def test_held_out_pictures_are_not_trained_on():
    assert not set(HELD_OUT_PICTURES) & set(TRAIN_PICTURES)

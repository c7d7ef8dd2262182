"""A hundred malformed VAEs, latents and images into our nodes: typed errors of one line.

One prompt for all, because a server answers each prompt by itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.comfy.graphs import load_vae, node
from tests.unit.malformed.cases import STATE
from tests.unit.malformed.test_checkpoints import CHECKPOINTS, WEIGHT
from tests.unit.malformed.test_kinds import ALL, MODELS, bytes_of

pytestmark = pytest.mark.comfy

Z = torch.zeros(1, 16, 2, 4, 4)
NAN = torch.full_like(Z, float("nan"))
LATENTS: dict[str, object] = {
    "nothing": None,
    "a text": "latent",
    "no samples": {},
    "no tensor": {"samples": None},
    "a list": {"samples": [Z]},
    "an array": {"samples": Z.numpy()},
    "a latent of Wan 2.2": {"samples": torch.zeros(1, 48, 2, 4, 4)},
    "four channels": {"samples": torch.zeros(1, 4, 2, 4, 4)},
    "four channels of an image": {"samples": torch.zeros(1, 4, 8, 8)},
    "frames before channels": {"samples": Z.transpose(1, 2)},
    "channels last": {"samples": Z.movedim(1, -1)},
    "three dimensions": {"samples": Z[0, :, 0]},
    "six dimensions": {"samples": Z[None]},
    "a scalar": {"samples": torch.zeros(())},
    **{f"size {i} is 0": {"samples": Z.narrow(i, 0, 0)} for i in range(5)},
    "NaN": {"samples": NAN},
    "inf in one frame": {"samples": torch.cat((Z, Z + float("inf")), dim=2)},
    **{
        f"of {dtype}": {"samples": Z.to(dtype)}
        for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "sparse": {"samples": Z.to_sparse()},
    "meta": {"samples": Z.to("meta")},
    "quantized": {"samples": torch.quantize_per_tensor(Z, 0.1, 0, torch.qint8)},
    "nested": {"samples": torch.nested.nested_tensor([Z[0], Z[0]])},
}
FRAME = torch.zeros(1, 32, 32, 3)
IMAGES: dict[str, object] = {
    "no image": None,
    "an array as image": np.zeros((1, 32, 32, 3)),
    "an image without a batch": FRAME[0],
    "an image of six dimensions": FRAME[None, None],
    "grey": FRAME[..., :1],
    "two channels": FRAME[..., :2],
    "no channels": FRAME[..., :0],
    "no frames": FRAME[:0],
    "no rows": FRAME[:, :0],
    "too small": FRAME[:, :4, :4],
    "NaN in an image": FRAME + float("nan"),
    **{
        f"image of {dtype}": FRAME.to(dtype)
        for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64)
    },
    "a sparse image": FRAME.to_sparse(),
    "a meta image": FRAME.to("meta"),
}
WEIGHTS: dict[str, object] = {
    "an empty state dict": {},
    "a state dict of text": {"decoder.head.2.weight": "x"},
    "keys that are numbers": {0: torch.ones(1)},
    "a nested weight": {**STATE, WEIGHT: torch.nested.nested_tensor([Z[0], Z[0]])},
    "a sparse weight": {**STATE, WEIGHT: STATE[WEIGHT].to_sparse()},
    "weights without data": {k: v.to("meta") for k, v in STATE.items()},
    **{f"{words}: {key}": {key: torch.ones(shape)} for key, shape, words in MODELS},
}


def cases(folder: Path) -> dict[str, tuple[str, object]]:
    """Every case by its name: its kind, and the thing itself."""
    found: dict[str, tuple[str, object]] = {}
    for case, (name, content, *_) in CHECKPOINTS.items():
        path = folder / f"{len(found)}{Path(name).suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content())
        found[case] = ("file", str(path))
    for case in ALL:
        path = folder / f"{len(found)}.safetensors"
        path.write_bytes(bytes_of(case))
        found[f"a file of {case}"] = ("file", str(path))
    for kind, things in (("latent", LATENTS), ("image", IMAGES), ("vae", WEIGHTS)):
        found |= {f"{kind}: {case}": (kind, thing) for case, thing in things.items()}
    return found


def test_every_malformed_thing_is_a_typed_error_in_one_line(comfy, tmp_path):
    things = cases(tmp_path)
    torch.save(things, tmp_path / "cases.pt")
    run = comfy.run(
        {
            "1": load_vae(),
            "2": node("ProbeMalformed", vae=["1", 0], file=str(tmp_path / "cases.pt")),
        }
    )
    assert run.error is None, run.error
    (found,) = run.outputs["2"]["found"]
    assert found.keys() == things.keys()
    wrong = {case: got for case, got in found.items() if not got[1] or "\n" in got[2]}
    assert not wrong, "\n".join(f"{case}: {got}" for case, got in wrong.items())
    # What float dtypes hold is read; all else is refused.
    done = {case for case, (name, *_) in found.items() if name == "done"}
    assert done == set(), sorted(done)
    ours = [case for case, (name, *_) in found.items() if name != "core"]
    assert len(ours) >= 100, len(ours)

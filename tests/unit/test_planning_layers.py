"""The walk over single layers against calls whose tensors are counted.

In every mixture of kernels and eager parts: kernels convert what eager parts give them, and the
other way round. A whole decode hides most of these copies, since they lie below its peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

import pytest
import torch

from tests.conftest import SMALL_CONFIGS
from tests.unit.counted import TensorCounter
from tests.unit.fake_layers import fake_layers, fake_ops
from wan_vae.chunking import Chunk
from wan_vae.layout import pack_weights, to_format
from wan_vae.network import architecture
from wan_vae.network.architecture import Block, Upsampler
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.network.model import WanVAEModel
from wan_vae.planning.peak import DecodeMemory, DecoderWalk

CONFIG = SMALL_CONFIGS["wan2.1"]
STAGES = architecture.stages(CONFIG)
LAYERS: dict[str, Block | Upsampler | None] = {
    "block": architecture.middle_blocks(CONFIG)[0],
    "block with a shortcut": STAGES[1].blocks[0],
    "attention": None,
    "temporal up-sampler": STAGES[0].up,
    "up-sampler": STAGES[2].up,
}
# Formats of weights and features. Kernels give NDHWC even where the weights are NCDHW.
FORMATS = [
    ("contiguous", "contiguous"),
    ("contiguous", "channels_last_3d"),
    ("channels_last_3d", "channels_last_3d"),
]
# Frames of a call, whether its chunk is the first, and whether it is the last.
CALLS = [(3, True, False), (4, False, False), (2, False, True), (1, True, True)]
ROWS, COLS = 96, 80


def parts_of(layer: Block | Upsampler | None) -> list[str]:
    """Names of the parts that a kernel may run."""
    if layer is None:
        return [architecture.ATTENTION]
    if isinstance(layer, Block):
        return [name for name in (layer.conv1, layer.shortcut, layer.conv2) if name]
    return [name for name in (layer.time_conv, layer.conv) if name]


def subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    for n in range(len(names) + 1):
        yield from combinations(names, n)


def walked(walk: DecoderWalk, layer: Block | Upsampler | None) -> None:
    if layer is None:
        walk.attention(architecture.trunk_channels(CONFIG), ROWS)
    elif isinstance(layer, Block):
        walk.block(layer, ROWS)
    else:
        walk.upsampler(layer, ROWS)


@pytest.fixture(scope="module", params=FORMATS, ids=" weights, ".join)
def model(request) -> tuple[WanVAEModel, str, str]:
    """A decoder without data, the format of its weights and that of the features it gets."""
    weights, features = request.param
    with torch.device("meta"):
        made = WanVAEModel(CONFIG).requires_grad_(False)
        pack_weights(made.decoder, weights)
    return made, weights, features


@pytest.mark.parametrize("family", ["triton", "cuda"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_takes_what_the_walk_says_whatever_part_of_it_kernels_run(
    model, kind, batch, family
):
    made, weights, features = model
    layer = LAYERS[kind]
    channels = layer.channels_in if layer else architecture.trunk_channels(CONFIG)
    module = made.get_submodule(layer.name if layer else architecture.ATTENTION)
    for covered, (frames, is_first, is_last) in product(subsets(parts_of(layer)), CALLS):
        layers = fake_layers(CONFIG, family, torch.float32, set(covered).__contains__)
        assert len(layers) == len(covered)
        ops, cache = fake_ops(made, layers), FeatureCache()
        x = torch.empty((batch, channels, frames, ROWS, COLS), device="meta")
        x = to_format(x, features)
        chunk = Chunk(0 if is_first else 4, frames if is_first else 4 + frames, is_first, is_last)
        with torch.inference_mode(), TensorCounter() as counter:
            if not is_first:
                module(x, Step(cache, Chunk(0, frames, True, False), ops=ops))
                counter.peak = counter.live  # the history
            y = module(x, Step(cache, chunk, ops=ops))
        shape = (batch, CONFIG.z_dim, 9, ROWS, COLS)
        memory = DecodeMemory(CONFIG, shape, torch.float32, weights, layers)
        walk = DecoderWalk(memory, chunk, ROWS, None)
        walk.ndhwc = features == "channels_last_3d"
        walked(walk, layer)
        history = 0 if is_first else walk.history
        case = f"{covered}, {frames} frames, first {is_first}, last {is_last}"
        # Not counted: the slice of a weight that a video of one frame uses.
        assert walk.found(0).peak == pytest.approx(counter.peak, rel=0.02), case
        assert walk.live + history == counter.live, case
        assert y.device.type == "meta"  # held until here

"""The whole network with its native names: encoder, decoder and the 1x1x1 convolutions between.

It is one nn.Module, so that a ComfyUI ModelPatcher can own it. Its state dict is the canonical one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..chunking import Pass
from ..config import WanVAEConfig
from ..errors import CheckpointError
from ..geometry import Strip
from ..ops.opset import OpSet
from ..said import said
from .blocks import CausalConv3d, Step
from .decoder import Decoder, join_passes
from .encoder import Encoder, PixelSource
from .weights import copied

NO_ENCODER = said(
    "vae.no_encoder", "this checkpoint has no encoder: load a full VAE file to encode"
)


class WanVAEModel(nn.Module):
    """Weights and arithmetic of one Wan VAE. Calls keep no state on it (see `Step`).

    Without an encoder in the checkpoint, `encoder` and `conv1` are None.
    """

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if config.has_encoder else None
        self.conv1 = (
            CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
            if config.has_encoder
            else None
        )
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        # Copies of the weights that kernels use, by request: see `kernels.select`. Dropped when the
        # weights move, so that an offloaded model leaves nothing on the device.
        self.prepared: dict[Hashable, tuple[object, OpSet]] = {}

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> WanVAEModel:
        self.prepared = {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles start without them.
        return self.__dict__ | {"prepared": {}}

    def trunk(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        """Latent chunk [B, z, T, H, W] -> decoder features at latent resolution."""
        return self.decoder.trunk(self.conv2(z, step), step)

    def finish(self, features: torch.Tensor, step: Step) -> torch.Tensor:
        """Features -> pixels [B, 3, T', H', W'] float32 in [-1, 1]."""
        return join_passes(self.finish_passes(features, step))

    def finish_passes(
        self, features: torch.Tensor, step: Step, strip: Strip | None = None
    ) -> Iterator[torch.Tensor]:
        """Like `finish` (for a strip: its rows), but yields the frames of each pass."""
        passes = self.decoder.passes(features, step, strip)
        del features  # `passes` frees it after reading
        for pixels in passes:
            yield pixels.float().clamp_(-1.0, 1.0)

    def decode_chunk(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        """Latent chunk [B, z, T, H, W] -> pixels [B, 3, T', H', W'] float32 in [-1, 1]."""
        return join_passes(self.decode_passes(z, step))

    def decode_passes(self, z: torch.Tensor, step: Step) -> Iterator[torch.Tensor]:
        """Like `decode_chunk`, but yields the frames of each pass."""
        yield from self.finish_passes(self.trunk(z, step), step)

    def encode_stages(
        self, pixels: PixelSource, frames: int, step: Step, strip: Strip | None = None
    ) -> Generator[None, None, torch.Tensor]:
        """Pixels -> features at the latent's resolution; see `Encoder.stages`."""
        if self.encoder is None:
            raise CheckpointError(NO_ENCODER)
        return self.encoder.stages(pixels, frames, step, strip)

    def encode_passes(self, frames: int, step: Step) -> Iterator[Pass]:
        """The passes for which `encode_stages` asks for pixels, in its order."""
        if self.encoder is None:
            raise CheckpointError(NO_ENCODER)
        return self.encoder.passes(frames, step)

    def moments(self, features: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Result of `encode_stages` -> mean and log-variance [B, z, t, h, w] of the posterior."""
        if self.encoder is None or self.conv1 is None:
            raise CheckpointError(NO_ENCODER)
        moments = self.encoder.trunk(features, step)
        del features
        mean, log_variance = self.conv1(moments, step).chunk(2, dim=1)
        return mean, log_variance

    def encode_chunk(self, pixels: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixel chunk [B, 3, T, H, W] -> mean and log-variance [B, z, t, h, w] of the posterior."""
        stages = self.encode_stages(
            lambda first, last: pixels[:, :, first:last], pixels.shape[2], step
        )
        return self.moments(result_of(stages), step)


def result_of(stages: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    """Run `stages` to the end, and return what it returns."""
    while True:
        try:
            next(stages)
        except StopIteration as stop:
            result: torch.Tensor = stop.value
            return result


@functools.lru_cache(maxsize=4)
def expected_shapes(config: WanVAEConfig) -> Mapping[str, tuple[int, ...]]:
    """Map the native key of every tensor of this architecture to its shape; allocates nothing."""
    with torch.device("meta"):
        model = WanVAEModel(config)
    return MappingProxyType({name: tuple(p.shape) for name, p in model.state_dict().items()})


def build_model(
    config: WanVAEConfig,
    state: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> WanVAEModel:
    """Build a frozen model on `device` in `dtype` from copies of `state` (canonical keys).

    The tensors are copied, so the caller's (a memory-mapped file, a live model of ComfyUI) are
    neither kept alive nor changed. `state` must hold exactly the expected keys.
    """
    return model_of(config, copied(state, device, dtype).state)


def model_of(config: WanVAEConfig, own: Mapping[str, torch.Tensor]) -> WanVAEModel:
    """A frozen model whose weights are the tensors `own` (canonical keys, exactly the expected
    ones)."""
    with torch.device("meta"):
        model = WanVAEModel(config)
    with torch.inference_mode(False), torch.no_grad():
        model.load_state_dict(own, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def weight_state(p: torch.Tensor) -> tuple[object, ...]:
    """What is another where `p` was given other numbers: a new tensor or new memory in its place
    (`p.data = ...`), or a change in place. What PyTorch does not count is not seen: changes in
    place through `p.data` or NumPy.

    Keeps nothing alive. An address alone would not do: memory that was given back is taken again,
    of two LoRAs that are merged one after the other by the second.
    """
    return weakref.ref(p.untyped_storage()), p.data_ptr(), p.dtype, tensor_version(p)


def tensor_version(p: torch.Tensor) -> int:
    """How often `p` was changed in place; -1 for inference tensors, which do not count it."""
    return -1 if p.is_inference() else p._version

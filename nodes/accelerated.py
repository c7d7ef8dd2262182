"""AcceleratedVAE: a VAE object for every node, which decodes and encodes with our network.

ComfyUI's own nodes and those of other packs call `vae.decode`, `vae.encode` and their tiled forms,
copy the object, replace its patcher or device, and read many attributes. So ours is a comfy.sd.VAE
with the attributes of the one that it was made from, and four methods of its own. All else is
ComfyUI's: what a node reads or calls beside the four it gets from the code of that version.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import comfy.sd
import torch

from ..wan_vae import LatentError, NotAWanVAEError, geometry
from ..wan_vae.io.image import as_rgb
from ..wan_vae.options import MemoryFormat
from ..wan_vae.said import said
from . import inputs, shards
from .executing import executing_node
from .session import session
from .shards import Sharding
from .weights import METHODS, replaced_methods

# Frames, rows and columns of a latent; None where a caller did not say.
Tile = tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class Options:
    """How an accelerated VAE works: the inputs of WanVAEAccelerate.

    sharding: None takes one device. node: the id of the node, for the panel. replaced: methods
    that another pack had replaced in the VAE that this one is made from.
    """

    memory_layout: MemoryFormat = "auto"
    precision: str = "auto"
    sharding: Sharding | None = None
    node: str | None = None
    replaced: tuple[str, ...] = ()


class AcceleratedVAE(comfy.sd.VAE):
    """A comfy.sd.VAE whose decode and encode are ours. `accelerated` makes one."""

    wan_vae: Options

    def decode(
        self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """The frames [B, T, H, W, 3] in [0, 1] of a latent [B, z, T, h, w] or [B, z, h, w].

        vae_options: for other models. Wan's has none, and raises LatentError for any.
        """
        return self._decode(samples_in, None, vae_options)

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """`decode` in about as much memory as one tile takes; sizes in latent pixels and frames.

        No tiles are made: the result is that of `decode`, and `overlap` changes nothing.
        """
        return self._decode(samples, (tile_t, tile_y, tile_x))

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """The latent [B, z, t, h, w] of frames [T, H, W, C], or of videos [B, T, H, W, C].

        Frames are one video, or where the VAE is set to `not_video` one image each.
        """
        return self._encode(pixel_samples, None)

    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """`encode` in about as much memory as one tile takes; sizes in pixels and frames."""
        factor = self.spacial_compression_encode()
        frames = None if tile_t is None else self.downscale_ratio[0](tile_t)
        rows, columns = (None if n is None else n // factor for n in (tile_y, tile_x))
        return self._encode(pixel_samples, (frames, rows, columns))

    def _session(self, operation: str) -> Any:
        options = self.wan_vae
        return session(
            executing_node(),
            self,
            options.precision,
            operation,
            options.node,
            is_shared=options.sharding is not None,
        )

    def _decode(
        self, samples: torch.Tensor, tile: Tile | None, asked: dict[str, Any] | None = None
    ) -> torch.Tensor:
        options = self.wan_vae
        with self._session("decode") as run:
            if asked:
                raise LatentError(
                    said(
                        "vae.options",
                        "a node asks this VAE for {names}, which a Wan VAE does not know: that "
                        "node is for another model",
                        names=", ".join(map(str, asked)),
                    )
                )
            latent = inputs.latent_5d({"samples": samples})
            shape = tuple(latent.shape)
            if options.sharding is not None:
                image = shards.decode(
                    run, latent, options.sharding, memory_format=options.memory_layout
                )
            else:
                bound = None if tile is None else _tile_shape(shape, tile)
                plan = run.plan(shape, memory_format=options.memory_layout, tile=bound)
                image = run.decode(latent, plan)
            return self._as_processed(image)

    def _encode(self, pixels: torch.Tensor, tile: Tile | None) -> torch.Tensor:
        options = self.wan_vae
        with self._session("encode") as run:
            config = run.wan.config
            are_images = self.not_video or config.image_only
            video = inputs.videos(self._cropped(pixels), are_images, config.colours)
            unit_range = _agree(self.process_input(_SAMPLE), _SAMPLE * 2 - 1)
            if not unit_range:  # another pack has replaced how pixels are scaled
                video = self.process_input(video)
            shape = geometry.latent_shape(tuple(video.shape), config)
            if options.sharding is not None:
                latent = shards.encode(
                    run,
                    video,
                    shape,
                    options.sharding,
                    memory_format=options.memory_layout,
                    unit_range=unit_range,
                )
            else:
                bound = None if tile is None else _tile_shape(shape, tile)
                plan = run.plan(
                    shape, operation="encode", memory_format=options.memory_layout, tile=bound
                )
                latent = run.encode(video, plan, unit_range)
            finish = getattr(self, "format_encoded", None)
            return latent if finish is None else finish(latent)

    def _cropped(self, pixels: torch.Tensor) -> torch.Tensor:
        cropped: torch.Tensor = self.vae_encode_crop_pixels(pixels)
        return cropped

    def _as_processed(self, image: torch.Tensor) -> torch.Tensor:
        """`image` in [0, 1] as `process_output` gives it, which other packs may have replaced."""
        if _agree(self.process_output(_SAMPLE * 2 - 1), _SAMPLE):
            return as_rgb(image)
        made: torch.Tensor = self.process_output((image * 2 - 1).movedim(-1, 1)).movedim(1, -1)
        return made


# Pixels of a video [1, 3, 1, 2, 2] in [0, 1], to ask a VAE how it scales them.
_SAMPLE = torch.linspace(0, 1, 12).view(1, 3, 1, 2, 2)


def _agree(made: torch.Tensor, expected: torch.Tensor) -> bool:
    return made.shape == expected.shape and torch.allclose(made, expected, atol=1e-6)


def _tile_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """The shape of one tile of a latent; a size that nobody asked for, or too large, is whole."""
    sizes = [
        whole if size is None else max(1, min(size, whole))
        for whole, size in zip(shape[2:], tile, strict=True)
    ]
    return (1, shape[1], *sizes)


def accelerated(vae: Any, options: Options) -> AcceleratedVAE:
    """A VAE object like `vae`, which stays as it is, that works as `options` say.

    Raises NotAWanVAEError for what is no VAE object of ComfyUI.
    """
    if not isinstance(vae, comfy.sd.VAE):
        raise NotAWanVAEError(
            said(
                "vae.foreign_class",
                "this VAE is a {name} of {module}: expected one of ComfyUI's own Load VAE "
                "(comfy.sd.VAE)",
                name=type(vae).__name__,
                module=type(vae).__module__,
            )
        )
    made: AcceleratedVAE = object.__new__(_class_over(type(vae)))
    made.__dict__.update(vars(vae))
    made.wan_vae = replace(options, replaced=tuple(replaced_methods(vae)))
    for name in METHODS:
        made.__dict__.pop(name, None)
    return made


def _class_over(cls: type) -> type[AcceleratedVAE]:
    """AcceleratedVAE with what another pack's subclass has beside our methods."""
    if issubclass(AcceleratedVAE, cls):
        return AcceleratedVAE
    if issubclass(cls, AcceleratedVAE):
        return cls
    return type(f"Accelerated{cls.__name__}", (AcceleratedVAE, cls), {})

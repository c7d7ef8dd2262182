"""The architecture of a Wan VAE, detected from the keys and shapes of its weights.

This is the first step of every run: the weights decide which latents fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .errors import CheckpointError, NotAWanVAEError
from .other_models import identify_other_model
from .said import said

Family = Literal["wan2.1", "wan2.2", "qwen-image-2.1"]

# Mean and standard deviation of each latent channel, with which the diffusion model was trained.
# Source: the published model configurations (Wan 2.1 `latents_mean` / `latents_std` of the
# diffusers-format repository; Wan 2.2 TI2V-5B likewise).
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
# Source: the defaults of diffusers' AutoencoderKLQwenImage21.
QWEN21_MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722,
    1.8873, -1.7177, -0.6510, 0.2732, 0.7562, -0.6163, -1.0277, 3.8363,
    2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464,
    -0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955,
    -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376,
    -1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729,
    -2.0595, 1.0960, -1.3260, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505,
    0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304,
)  # fmt: skip
QWEN21_STD = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910,
    3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675, 3.7320, 5.0756,
    3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489,
    3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.2830, 3.5694, 4.2467,
    3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125,
    3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875,
    3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959,
    3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161,
)  # fmt: skip


@dataclass(frozen=True)
class WanVAEConfig:
    """All sizes and switches that define the architecture.

    `dim` and `decoder_dim` are the base widths of encoder and decoder (96 / 96 for Wan 2.1,
    160 / 256 for Wan 2.2); a stage has `base * dim_mult[i]` channels. `temporal_downsample[i]`
    says whether the i-th encoder down-sampler also halves time; the decoder mirrors it.
    `patch_size` and `decoder_patch_size` are the sides of the pixel patches folded into channels:
    1 and 1 for Wan 2.1, 2 and 2 for Wan 2.2, 1 and 2 for a decoder that doubles the picture.
    `colours` and `decoder_colours` count the channels of a picture that goes in and comes out: 3,
    4 with alpha, 1 for a grey one. `image_only`: the kernels see one frame, so there is no video.
    """

    family: Family
    z_dim: int
    dim: int
    decoder_dim: int
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    decoder_patch_size: int = 1
    colours: int = 3
    decoder_colours: int = 3
    image_only: bool = False
    has_encoder: bool = True
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @property
    def spatial_factor(self) -> int:
        """Pixels on one side of a latent pixel where a picture is encoded: 8 (Wan 2.1) or 16."""
        return (1 << len(self.temporal_downsample)) * self.patch_size

    @property
    def decoded_factor(self) -> int:
        """Pixels on one side of what a latent pixel decodes to: `spatial_factor`, or twice that."""
        return (1 << len(self.temporal_downsample)) * self.decoder_patch_size

    @property
    def temporal_factor(self) -> int:
        """Pixel frames for each latent frame after the first: 4."""
        return 1 << sum(self.temporal_downsample)

    @property
    def encoder_channels(self) -> int:
        """Channels that the encoder's first convolution reads: colours times a patch's area."""
        return self.colours * self.patch_size**2

    @property
    def decoder_channels(self) -> int:
        """Channels that the decoder's head writes: colours times a patch's area."""
        return self.decoder_colours * self.decoder_patch_size**2

    @property
    def rows_first(self) -> bool:
        """Whether the pixels of a decoded patch are rows of columns, as in a pixel shuffle.

        Wan 2.2 has columns of rows. Source: the model card of Wan2.1-VAE-upscale2x.
        """
        return self.decoder_patch_size != self.patch_size

    @property
    def residual_shortcuts(self) -> bool:
        """True for Wan 2.2: every stage that resamples has a shortcut without parameters."""
        return self.family != "wan2.1"

    @property
    def default_fps(self) -> float:
        """Frames per second of the model's videos: 24 for Wan 2.2 5B, 16 for the others."""
        return 24.0 if self.family == "wan2.2" else 16.0

    def as_dict(self) -> dict[str, object]:
        """The entry `config` of the report, ready for JSON."""
        return {
            "family": self.family,
            "z_dim": self.z_dim,
            "dim": self.dim,
            "decoder_dim": self.decoder_dim,
            "spatial_factor": self.spatial_factor,
            "decoded_factor": self.decoded_factor,
            "temporal_factor": self.temporal_factor,
            "patch_size": self.patch_size,
            "decoder_patch_size": self.decoder_patch_size,
            "colours": self.colours,
            "decoder_colours": self.decoder_colours,
            "image_only": self.image_only,
            "has_encoder": self.has_encoder,
        }


def wan21(
    dim: int = 96,
    z_dim: int = 16,
    has_encoder: bool = True,
    decoder_dim: int | None = None,
) -> WanVAEConfig:
    """The Wan 2.1 architecture with base width `dim`; Qwen-Image and others use it too.

    decoder_dim: of a pruned decoder beside a full encoder; None is `dim`.
    """
    known = z_dim == len(WAN21_MEAN)
    return WanVAEConfig(
        family="wan2.1",
        z_dim=z_dim,
        dim=dim,
        decoder_dim=decoder_dim or dim,
        has_encoder=has_encoder,
        latents_mean=WAN21_MEAN if known else None,
        latents_std=WAN21_STD if known else None,
    )


def wan22(
    dim: int = 160, decoder_dim: int = 256, z_dim: int = 48, has_encoder: bool = True
) -> WanVAEConfig:
    """The Wan 2.2 (TI2V-5B) architecture with base widths `dim` and `decoder_dim`."""
    known = z_dim == len(WAN22_MEAN)
    return WanVAEConfig(
        family="wan2.2",
        z_dim=z_dim,
        dim=dim,
        decoder_dim=decoder_dim,
        patch_size=2,
        decoder_patch_size=2,
        has_encoder=has_encoder,
        latents_mean=WAN22_MEAN if known else None,
        latents_std=WAN22_STD if known else None,
    )


def qwen21(
    dim: int = 96, decoder_dim: int = 144, z_dim: int = 64, has_encoder: bool = True
) -> WanVAEConfig:
    """The Qwen-Image 2.1 architecture: Wan 2.2's blocks, four halvings, images with alpha."""
    known = z_dim == len(QWEN21_MEAN)
    return WanVAEConfig(
        family="qwen-image-2.1",
        z_dim=z_dim,
        dim=dim,
        decoder_dim=decoder_dim,
        dim_mult=(1, 2, 4, 8, 8),
        temporal_downsample=(False, True, True, True),
        colours=4,
        decoder_colours=4,
        image_only=True,
        has_encoder=has_encoder,
        latents_mean=QWEN21_MEAN if known else None,
        latents_std=QWEN21_STD if known else None,
    )


def detect_config(state: Mapping[str, torch.Tensor]) -> WanVAEConfig:
    """Detect the architecture from the keys and shapes of a native state dict.

    Raises NotAWanVAEError for another model, with its name if it is known, and CheckpointError if
    a tensor that decides the architecture is missing or has an impossible shape.
    """
    if not state:
        raise NotAWanVAEError(
            said("vae.empty", "the checkpoint holds no tensors: expected a Wan 2.1 or 2.2 VAE")
        )
    if "decoder.middle.0.residual.0.gamma" not in state:
        other = identify_other_model(state)
        sample = ", ".join(sorted(state)[:3])
        if other:
            finding = said(
                "vae.other_model",
                "this is {other}, not a Wan VAE (first keys: {sample})",
                other=other,
                sample=sample,
            )
        else:
            finding = said(
                "vae.unknown",
                "not a Wan VAE: no tensor decoder.middle.0.residual.0.gamma among {count} (first "
                "keys: {sample})",
                count=len(state),
                sample=sample,
            )
        raise NotAWanVAEError(
            said(
                "vae.load_wan",
                "{finding}: load a Wan 2.1 or 2.2 VAE such as wan_2.1_vae.safetensors",
                finding=finding,
            ),
            finding,
        )
    is_residual = "decoder.upsamples.0.upsamples.0.residual.2.weight" in state
    outputs, _, frames = _shape(state, "decoder.head.2.weight", 5)[:3]
    z_dim = _shape(state, "decoder.conv1.weight", 5)[1]
    decoder_dim = _shape(state, "decoder.head.0.gamma", 4)[0]
    has_encoder = "encoder.conv1.weight" in state
    dim, inputs = _shape(state, "encoder.conv1.weight", 5)[:2] if has_encoder else (None, None)
    # Files without an encoder do not tell its width: the published ratios are taken.
    if not is_residual:
        config = wan21(dim or decoder_dim, z_dim, has_encoder, decoder_dim)
    elif "decoder.upsamples.4.upsamples.0.residual.2.weight" in state:
        config = qwen21(dim or decoder_dim * 96 // 144, decoder_dim, z_dim, has_encoder)
    else:
        config = wan22(dim or decoder_dim * 160 // 256, decoder_dim, z_dim, has_encoder)
    return _pictures(replace(config, image_only=frames == 1), inputs, outputs)


# What the channels of the decoder's head hold: colours and the side of a patch. 12 of a Wan 2.1
# decoder are 3 colours of patches of 2 x 2: the picture is twice as large (Wan2.1-VAE-upscale2x).
_HEADS = {3: (3, 1), 4: (4, 1), 1: (1, 1), 12: (3, 2), 16: (4, 2)}


def _pictures(config: WanVAEConfig, inputs: int | None, outputs: int) -> WanVAEConfig:
    """`config` with the colours and patches that `inputs` and `outputs` channels hold.

    inputs: of the encoder's first convolution, None without an encoder. Raises NotAWanVAEError.
    """
    head = _HEADS.get(outputs)
    if head is None or (head[1] < config.decoder_patch_size):
        known = [n for n, (_, patch) in _HEADS.items() if patch >= config.decoder_patch_size]
        raise NotAWanVAEError(
            said(
                "vae.unknown_outputs",
                "not a {family} VAE that is known: decoder.head.2.weight has {outputs} "
                "outputs, expected one of {known}",
                family=config.family,
                outputs=outputs,
                known=", ".join(map(str, sorted(known))),
            )
        )
    area = config.patch_size**2
    colours = head[0] if inputs is None else inputs // area
    if inputs is not None and (inputs % area or colours not in (3, 4)):
        raise NotAWanVAEError(
            said(
                "vae.unknown_inputs",
                "not a {family} VAE that is known: encoder.conv1.weight has {inputs} "
                "inputs, expected {without} or {alpha}",
                family=config.family,
                inputs=inputs,
                without=3 * area,
                alpha=4 * area,
            )
        )
    return replace(config, colours=colours, decoder_colours=head[0], decoder_patch_size=head[1])


def _shape(state: Mapping[str, torch.Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(
            said(
                "vae.lacks",
                "the checkpoint is missing {name}, which decides the architecture",
                name=key,
            )
        )
    shape = tuple(state[key].shape)
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(
            said(
                "vae.dimensions",
                "{name} has shape {shape}: expected {dimensions} non-empty dimensions",
                name=key,
                shape=shape,
                dimensions=ndim,
            )
        )
    return shape

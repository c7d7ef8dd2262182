"""The architecture of a Wan VAE, detected from the keys and shapes of its weights.

This is the first step of every run: the weights decide which latents fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .errors import CheckpointError, NotAWanVAEError

Family = Literal["wan2.1", "wan2.2"]

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


@dataclass(frozen=True)
class WanVAEConfig:
    """All sizes and switches that define the architecture.

    `dim` and `decoder_dim` are the base widths of encoder and decoder (96 / 96 for Wan 2.1,
    160 / 256 for Wan 2.2); a stage has `base * dim_mult[i]` channels. `temporal_downsample[i]`
    says whether the i-th encoder down-sampler also halves time; the decoder mirrors it.
    `patch_size` is the side of the pixel patches folded into channels (1 or 2).
    """

    family: Family
    z_dim: int
    dim: int
    decoder_dim: int
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    has_encoder: bool = True
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @property
    def spatial_factor(self) -> int:
        """Pixels on one side of a latent pixel: 8 (Wan 2.1) or 16 (Wan 2.2)."""
        return (1 << len(self.temporal_downsample)) * self.patch_size

    @property
    def temporal_factor(self) -> int:
        """Pixel frames for each latent frame after the first: 4."""
        return 1 << sum(self.temporal_downsample)

    @property
    def image_channels(self) -> int:
        """Channels of the network's pixels: 3 colours times the area of a patch."""
        return 3 * self.patch_size**2

    @property
    def residual_shortcuts(self) -> bool:
        """True for Wan 2.2: every stage that resamples has a shortcut without parameters."""
        return self.family == "wan2.2"

    def as_dict(self) -> dict[str, object]:
        """The entry `config` of the report, ready for JSON."""
        return {
            "family": self.family,
            "z_dim": self.z_dim,
            "dim": self.dim,
            "decoder_dim": self.decoder_dim,
            "spatial_factor": self.spatial_factor,
            "temporal_factor": self.temporal_factor,
            "patch_size": self.patch_size,
            "has_encoder": self.has_encoder,
        }


def wan21(dim: int = 96, z_dim: int = 16, has_encoder: bool = True) -> WanVAEConfig:
    """The Wan 2.1 architecture with base width `dim`; Qwen-Image and others use it too."""
    known = z_dim == len(WAN21_MEAN)
    return WanVAEConfig(
        family="wan2.1",
        z_dim=z_dim,
        dim=dim,
        decoder_dim=dim,
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
        has_encoder=has_encoder,
        latents_mean=WAN22_MEAN if known else None,
        latents_std=WAN22_STD if known else None,
    )


# One key that identifies each model that users confuse with a Wan VAE, most specific first.
# Source: the state-dict keys that each project publishes.
_LOOK_ALIKES: tuple[tuple[str, str], ...] = (
    (
        "blocks.0.self_attn.q.weight",
        "a Wan diffusion transformer (the UNET / diffusion model file)",
    ),
    (
        "blocks.0.cross_attn.k.weight",
        "a Wan diffusion transformer (the UNET / diffusion model file)",
    ),
    ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "an LTX-Video VAE"),
    ("decoder.last_scale_shift_table", "an LTX-Video VAE"),
    ("decoder.up.0.block.0.conv1.conv.weight", "a HunyuanVideo VAE"),
    ("decoder.up_blocks.0.resnets.0.conv1.conv.weight", "a HunyuanVideo or CogVideoX VAE"),
    ("decoder.mid.block_1.conv1.conv.weight", "a HunyuanVideo VAE"),
    ("decoder.blocks.0.0.weight", "a Mochi VAE"),
    ("blocks.2.blocks.3.stack.5.weight", "a Mochi VAE"),
    ("decoder.unpatcher3d.wavelets", "a Cosmos tokenizer"),
    ("decoder.unpatcher3d._arange", "a Cosmos tokenizer"),
    ("taesd_decoder.1.weight", "a TAESD preview decoder"),
    ("decoder.1.weight", "a TAEHV / TAESD preview decoder"),
    ("decoder.up_blocks.0.resnets.0.norm1.weight", "a Stable Diffusion / SDXL / Flux image VAE"),
    ("decoder.up.0.block.0.norm1.weight", "a Stable Diffusion / SDXL / Flux image VAE"),
    ("decoder.mid.block_1.norm1.weight", "a Stable Diffusion / SDXL / Flux image VAE"),
    ("vquantizer.codebook.weight", "a Stable Cascade stage A"),
    ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder"),
    ("shared.weight", "a T5 text encoder"),
)


def identify_other_model(keys: Mapping[str, object]) -> str | None:
    """Return the name of the model that has `keys`, or None if it is unknown."""
    for key, name in _LOOK_ALIKES:
        if key in keys:
            return name
    return None


def detect_config(state: Mapping[str, torch.Tensor]) -> WanVAEConfig:
    """Detect the architecture from the keys and shapes of a native state dict.

    Raises NotAWanVAEError for another model, with its name if it is known, and CheckpointError if
    a tensor that decides the architecture is missing or has an impossible shape.
    """
    if not state:
        raise NotAWanVAEError("the checkpoint holds no tensors: expected a Wan 2.1 or 2.2 VAE")
    if "decoder.middle.0.residual.0.gamma" not in state:
        other = identify_other_model(state)
        sample = ", ".join(sorted(state)[:3])
        if other:
            raise NotAWanVAEError(
                f"this is {other}, not a Wan VAE (first keys: {sample}): load a Wan 2.1 or 2.2 VAE "
                "such as wan_2.1_vae.safetensors"
            )
        raise NotAWanVAEError(
            f"not a Wan VAE: no tensor decoder.middle.0.residual.0.gamma among {len(state)} "
            f"(first keys: {sample}): load a Wan 2.1 or 2.2 VAE such as wan_2.1_vae.safetensors"
        )
    is_22 = "decoder.upsamples.0.upsamples.0.residual.2.weight" in state
    head = _shape(state, "decoder.head.2.weight", 5)
    if is_22 and head[2] == 1:
        raise NotAWanVAEError(
            "this is the Qwen-Image 2.1 VAE, which looks like Wan 2.2's but has one-frame kernels "
            f"(decoder.head.2.weight is {head}, Wan 2.2 has (12, 256, 3, 3, 3)): decode it with "
            "ComfyUI's own VAE Decode"
        )
    z_dim = _shape(state, "decoder.conv1.weight", 5)[1]
    decoder_dim = _shape(state, "decoder.head.0.gamma", 4)[0]
    has_encoder = "encoder.conv1.weight" in state
    dim = _shape(state, "encoder.conv1.weight", 5)[0] if has_encoder else None
    if is_22:
        if head[0] != 12:
            raise NotAWanVAEError(
                f"not a Wan 2.2 VAE: decoder.head.2.weight has {head[0]} outputs, expected 12"
            )
        # A file without an encoder does not tell its width; Wan 2.2's ratio is 160 / 256.
        return wan22(dim or decoder_dim * 160 // 256, decoder_dim, z_dim, has_encoder)
    if head[0] != 3:
        raise NotAWanVAEError(
            f"not a Wan 2.1 VAE: decoder.head.2.weight has {head[0]} outputs, expected 3"
        )
    if dim is not None and dim != decoder_dim:
        raise CheckpointError(
            f"encoder width {dim} (encoder.conv1.weight) and decoder width {decoder_dim} "
            "(decoder.head.0.gamma) differ: a Wan 2.1 VAE has one width for both"
        )
    return wan21(decoder_dim, z_dim, has_encoder)


def _shape(state: Mapping[str, torch.Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"the checkpoint is missing {key}, which decides the architecture")
    shape = tuple(state[key].shape)
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(f"{key} has shape {shape}: expected {ndim} non-empty dimensions")
    return shape

"""What other models call their tensors: the name of a file that somebody took for a Wan VAE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What bundles and trainers put in front of the keys below.
_PREFIX = re.compile(
    r"^(first_stage_model|vae|module|model\.diffusion_model|diffusion_model|_orig_mod|text_encoder"
    r"|transformer|state_dict|net|base_model\.model)\."
)
_DIFFUSION = "(the UNET / diffusion model file)"
# One key of each model that users confuse with a Wan VAE, most specific first. A key that ends with
# a dot is the start of one. Source: the state-dict keys that each project publishes.
_KEYS: tuple[tuple[str, str], ...] = (
    ("latent_tensor", "a latent"),
    ("encoder.middle.0.residual.0.gamma", "half a Wan VAE: its encoder without the decoder"),
    ("encoder.mid_block.resnets.0.norm1.gamma", "half a Wan VAE: its encoder without the decoder"),
    ("blocks.0.self_attn.q.weight", f"a Wan diffusion transformer {_DIFFUSION}"),
    ("blocks.0.cross_attn.k.weight", f"a Wan diffusion transformer {_DIFFUSION}"),
    ("blocks.0.attn1.to_q.weight", f"a Wan diffusion transformer {_DIFFUSION}"),
    ("double_blocks.0.img_attn.qkv.weight", f"a Flux diffusion transformer {_DIFFUSION}"),
    ("double_blocks.0.img_attn_qkv.weight", f"a HunyuanVideo diffusion transformer {_DIFFUSION}"),
    ("transformer_blocks.0.attn.add_k_proj.weight", f"a Qwen-Image or other diffusion transformer "
     f"{_DIFFUSION}"),
    ("transformer_blocks.0.attn1.to_q.weight", f"an LTX-Video diffusion transformer {_DIFFUSION}"),
    ("joint_blocks.0.x_block.attn.qkv.weight", f"a Stable Diffusion 3 transformer {_DIFFUSION}"),
    ("input_blocks.0.0.weight", "a Stable Diffusion checkpoint"),
    ("lora_unet_", "a LoRA"),
    ("decoder.up_blocks.0.upsamplers.0.upscale_conv.weight", "a SeedVR2 VAE"),
    ("decoder.up_blocks.2.upsamplers.0.upscale_conv.weight", "a SeedVR2 VAE"),
    ("decoder.conv_in_x_t.weight", "an LTX-Video VAE (its diffusion decoder)"),
    ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "an LTX-Video VAE"),
    ("decoder.last_scale_shift_table", "an LTX-Video VAE"),
    ("decoder.up_blocks.2.conv_in.conv1.conv.weight", "an LTX-Video VAE"),
    ("decoder.mid_block.resnets.4.conv1.conv.weight", "an LTX-2 VAE"),
    ("vocoder.resblocks.0.convs1.0.weight", "an LTX-2 audio VAE"),
    ("vocoder.vocoder.resblocks.0.convs1.0.weight", "an LTX-2 audio VAE"),
    ("decoder.mid_block.resnets.0.norm1.norm_layer.weight", "a CogVideoX VAE"),
    ("decoder.block_in.resnets.0.norm1.norm_layer.weight", "a Mochi VAE"),
    ("decoder.up.0.block.0.conv1.conv.weight", "a HunyuanVideo VAE"),
    ("decoder.mid.block_1.conv1.conv.weight", "a HunyuanVideo VAE"),
    ("decoder.up_blocks.0.resnets.0.conv1.conv.weight", "a HunyuanVideo VAE"),
    ("decoder.blocks.0.0.weight", "a Mochi VAE"),
    ("blocks.2.blocks.3.stack.5.weight", "a Mochi VAE"),
    ("decoder.blocks.2.blocks.3.stack.5.weight", "a Mochi VAE"),
    ("decoder.unpatcher3d.wavelets", "a Cosmos tokenizer"),
    ("decoder.unpatcher3d._arange", "a Cosmos tokenizer"),
    ("decoder.conv_in.conv_s.weight", "a Cosmos tokenizer"),
    ("decoder.temp_conv_in.weight", "an Allegro VAE"),
    ("decoder.mid_block.convs.0.conv1.weight", "an EasyAnimate VAE"),
    ("decoder.time_conv_out.weight", "a Stable Video Diffusion VAE"),
    ("decoder.mid.block_1.mix_factor", "a Stable Video Diffusion VAE"),
    ("taesd_decoder.1.weight", "a TAESD preview decoder"),
    ("decoder.layers.18.weight", "a TAESD preview decoder"),
    ("decoder.22.bias", "a TAEHV preview decoder (taew2_1 and others)"),
    ("decoder.1.weight", "a TAEHV / TAESD preview decoder"),
    ("vquantizer.codebook.weight", "a Stable Cascade stage A"),
    ("decoder.layers.1.layers.0.beta", "a Stable Audio VAE"),
    ("vocoder.backbone.channel_layers.0.0.bias", "an ACE-Step audio VAE"),
    ("vocoder.activation_post.downsample.lowpass.filter", "an MMAudio VAE"),
    ("pixel_space_vae", "a pixel-space VAE, which has no weights"),
    ("geo_decoder.cross_attn_decoder.ln_1.bias", "a Hunyuan3D VAE"),
    ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder"),
    ("vision_model.embeddings.patch_embedding.weight", "a CLIP vision encoder"),
    ("visual.transformer.0.attn.to_qkv.weight", "a CLIP vision encoder"),
    ("shared.weight", "a T5 text encoder"),
    ("token_embedding.weight", "a T5 text encoder"),
    ("model.embed_tokens.weight", "a language model (a text encoder)"),
    ("model.language_model.embed_tokens.weight", "a language model (a text encoder)"),
)  # fmt: skip
_IMAGE_VAE = (
    "decoder.up_blocks.0.resnets.0.norm1.weight",
    "decoder.up.0.block.0.norm1.weight",
    "decoder.mid.block_1.norm1.weight",
    "decoder.mid_block.resnets.0.norm1.weight",
    "decoder.conv_in.weight",
)
# Its name by the latent channels of its decoder; those of SD 3 have the keys and shapes of Flux's.
_IMAGE_VAES = {
    4: "a Stable Diffusion VAE (1, 2 or XL)",
    16: "a Flux or Stable Diffusion 3 image VAE",
    32: "a Flux 2 image VAE",
    64: "a HunyuanImage VAE",
}
_LORA = re.compile(r"\.(lora_(A|B|down|up)|diff|hada_w1_a|lokr_w1)(\.|$)")


def identify_other_model(state: Mapping[str, Any]) -> str | None:
    """The name of the model that has the keys and shapes of `state`, or None if it is unknown."""
    keys = {_PREFIX.sub("", key): key for key in state}
    for known, name in _KEYS:
        if known in keys or (known.endswith("_") and any(k.startswith(known) for k in keys)):
            return name
    if any(_LORA.search(key) for key in state):
        return "a LoRA"
    if any(known in keys for known in _IMAGE_VAE):
        return _image_vae(state, keys)
    return None


def _image_vae(state: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    first = keys.get("decoder.conv_in.weight")
    shape = () if first is None else tuple(getattr(state[first], "shape", ()))
    if len(shape) == 5:
        return "a HunyuanVideo 1.5 or another video VAE"
    if len(shape) == 4 and shape[1] in _IMAGE_VAES:
        return _IMAGE_VAES[shape[1]]
    return "a Stable Diffusion, SDXL or Flux image VAE"

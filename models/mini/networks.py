"""The bundled model's parts, built from configs in diffusers' and transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

LATENT_CHANNELS = 32
TEXT_DIM = 128
TEXT_LENGTH = 64
FLOW_SHIFT = 3.0


def build_vae() -> AutoencoderKLWan:
    """A small causal VAE: 16x spatial and 4x temporal compression, Wan 2.2's residual shortcuts and 2x2 patches."""
    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True, False],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    return channels_last(vae)


def channels_last(module: nn.Module) -> Any:
    """Convolution weights in channels-last order: oneDNN's fast path on CPUs."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data = part.weight.data.to(memory_format=torch.channels_last_3d)
        elif isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.to(memory_format=torch.channels_last)
    return module


def build_transformer() -> WanTransformer3DModel:
    """The denoiser: a Wan DiT of width 256; 16 tokens a latent frame at 128x128."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=8,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=1024,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder, trained along with the denoiser."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """Flow matching with Wan's default solver."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )

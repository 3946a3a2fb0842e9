"""A real checkpoint of the bundled model's kind, some hundred thousand random weights, built in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from models.mini.captioner import Captioner
from models.mini.rewriter import Rewriter
from models.mini.words import encode, vocabulary
from models.tiny_decoder import TINY_DECODER, TinyDecoder

CHANNELS = 8
TEXT_DIM = 16
# Of 1000 timesteps: the first steps of four are above it, the last below.
BOUNDARY_RATIO = 0.8
MAX_TOKENS = 64
# Loose prompts that the tiny rewriter knows, and what it makes of each by the video's seed, even or odd.
REWRITTEN = {
    "crimson ball hops": (
        "a small red ball bouncing on a grey floor at noon",
        "a large red ball bouncing on a grey floor at noon",
    ),
    "dice twirling, night, zoom in": (
        "a small white cube spinning on a sand floor at night, the camera zooms in",
        "a large white cube spinning on a sand floor at night, the camera zooms in",
    ),
}
# What the tiny captioner says of latents that are all of one value.
CAPTIONED = {
    -1.0: "a small red ball moving left on a grey floor at noon",
    1.0: "a large white cube spinning on a sand floor at night, the camera zooms in",
}
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "max_tokens": MAX_TOKENS,
    "fps": 16,
    "sampler": {"num_inference_steps": 4, "guidance_scale": 3.0},
    "limits": {
        "default_size": [128, 128],
        "min_side": 64,
        "max_side": 256,
        "size_multiple": 16,
        "default_seconds": 2,
        "max_seconds": 8,
    },
}
CAUSAL_SETTINGS = {
    "name": "tiny-causal",
    "max_tokens": MAX_TOKENS,
    "rollout": "causal",
    # Three chunks in all, so that short videos outlive it.
    "causal": {"sink_chunks": 1, "window_chunks": 2},
    "sampler": {"name": "renoise", "shift": 3.0, "num_inference_steps": 2, "guidance_scale": 1.0},
    "limits": {
        "default_size": [64, 64],
        "min_side": 64,
        "max_side": 256,
        "size_multiple": 16,
        "default_seconds": 4,
        "max_seconds": 120,
    },
}


def build_tiny_checkpoint(path: Path, *, causal: bool = False, experts: bool = False) -> None:
    """Write a `WanPipeline` directory with a `rushes.json`.

    `experts`: as Wan 2.2 A14B, two transformers and Wan 2.1's VAE; else as TI2V-5B, one and Wan 2.2's VAE.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    WanPipeline(
        tokenizer=wrapped(tokenizer),
        text_encoder=tiny_text_encoder(tokenizer.get_vocab_size()),
        vae=tiny_vae(residual=not experts, smaller=8),
        transformer_2=tiny_transformer() if experts else None,
        boundary_ratio=BOUNDARY_RATIO if experts else None,
        expand_timesteps=not experts,
        # Two layers where there is a cache, since each has its own part of it.
        transformer=tiny_transformer(layers=2 if causal else 1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    ).save_pretrained(path)
    tiny_rewriter().save(path / "rewriter")
    tiny_captioner().save(path / "captioner")
    if causal:
        TinyDecoder(CHANNELS, widths=(8, 8, 8, 8), blocks=1, patch=2).save(path / TINY_DECODER)
    settings = SETTINGS | (CAUSAL_SETTINGS if causal else {})
    (path / "rushes.json").write_text(json.dumps(settings))


PICTURED_SETTINGS = SETTINGS | {
    "name": "tiny-pictured",
    # By which text and image are told apart.
    "max_tokens": 512,
    "limits": {
        "default_size": [64, 64],
        "min_side": 64,
        "max_side": 96,
        "size_multiple": 16,
        "default_seconds": 1,
        "max_seconds": 1,
    },
}


def build_tiny_pictured(path: Path, *, experts: bool = False) -> None:
    """Write a `WanImageToVideoPipeline` directory: as Wan 2.1, with CLIP, or with the `experts` of A14B and without."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    clip: dict[str, Any] = {} if experts else {"image_dim": TEXT_DIM, "added_kv_proj_dim": 24}
    # In this order, so that they have the weights that the experts' checkpoint has.
    text_encoder, vae = tiny_text_encoder(tokenizer.get_vocab_size()), tiny_vae(residual=False, smaller=8)
    # Latents, the mask of their four frames each, and the picture's latents.
    transformers = [tiny_transformer(in_channels=2 * CHANNELS + 4, **clip) for _ in range(1 + experts)]
    WanImageToVideoPipeline(
        tokenizer=wrapped(tokenizer),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformers[0],
        transformer_2=transformers[1] if experts else None,
        boundary_ratio=BOUNDARY_RATIO if experts else None,
        image_encoder=None if experts else tiny_image_encoder(),
        image_processor=None
        if experts
        else CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    ).save_pretrained(path)
    settings = PICTURED_SETTINGS | ({"max_tokens": MAX_TOKENS} if experts else {})
    (path / "rushes.json").write_text(json.dumps(settings))


def build_tiny_ltx(path: Path, *, newer: bool = True) -> None:
    """Write an `LTXPipeline` directory with a `rushes.json`: as 0.9.0, or with a VAE that denoises, as later ones."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    LTXPipeline(
        tokenizer=wrapped(tokenizer),
        text_encoder=tiny_t5(tokenizer.get_vocab_size()),
        vae=tiny_ltx_vae(newer),
        transformer=_louder(
            LTXVideoTransformer3DModel(
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                num_attention_heads=2,
                attention_head_dim=16,
                cross_attention_dim=32,
                num_layers=1,
                caption_channels=TEXT_DIM,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
    ).save_pretrained(path)
    settings = {
        "name": "tiny-ltx",
        "fps": 8,
        "max_tokens": MAX_TOKENS,
        "chunk_latent_frames": 2,
        "sampler": {"num_inference_steps": 4, "guidance_scale": 3.0},
        "limits": {
            "default_size": [64, 64],
            "min_side": 64,
            "max_side": 128,
            "size_multiple": 32,
            "default_seconds": 2,
            "max_seconds": 4,
        },
    }
    (path / "rushes.json").write_text(json.dumps(settings))


def tiny_ltx_vae(newer: bool) -> Any:
    style: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    }
    if newer:
        style = {
            "block_out_channels": (8, 8, 8, 8, 8),
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, True, True),
            "decoder_spatio_temporal_scaling": (True, True, True),
            "decoder_inject_noise": (False, False, False, False),
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "upsample_residual": (True, True, True),
            "upsample_factor": (2, 2, 2),
            "timestep_conditioning": True,
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        }
    return _louder(AutoencoderKLLTXVideo(latent_channels=CHANNELS, **style))


def build_tiny_cogvideox(path: Path, *, newer: bool = False) -> None:
    """Write a `CogVideoXPipeline` directory: as 2B, with sines and DDIM, or as 1.5-5B: RoPE, patches in time, DPM."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    positions: dict[str, Any] = {"sample_height": 8, "sample_width": 12, "sample_frames": 9}
    if newer:
        positions |= {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False}
        positions |= {"sample_height": 16, "sample_width": 16}
    schedule: dict[str, Any] = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "snr_shift_scale": 1.0 if newer else 3.0,
    }
    CogVideoXPipeline(
        tokenizer=wrapped(tokenizer),
        text_encoder=tiny_t5(tokenizer.get_vocab_size()),
        vae=AutoencoderKLCogVideoX(
            latent_channels=CHANNELS,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7,
        ).eval(),
        transformer=tiny_cogvideox_transformer(**positions),
        scheduler=(CogVideoXDPMScheduler if newer else CogVideoXDDIMScheduler)(**schedule),
    ).save_pretrained(path)
    settings = {
        "name": "tiny-cogvideox",
        "fps": 8,
        "max_tokens": MAX_TOKENS,
        "sampler": {"num_inference_steps": 4, "guidance_scale": 3.0},
        "limits": {
            "default_size": [64, 64],
            "min_side": 64,
            "max_side": 128,
            "size_multiple": 16,
            "default_seconds": 1,
            "max_seconds": 2,
        },
    }
    (path / "rushes.json").write_text(json.dumps(settings))


def tiny_cogvideox_transformer(**config: Any) -> Any:
    return _louder(
        CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            time_embed_dim=16,
            text_embed_dim=TEXT_DIM,
            num_layers=1,
            max_text_seq_length=MAX_TOKENS,
            **config,
        )
    )


def wrapped(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=MAX_TOKENS
    )


def tiny_tokenizer() -> Tokenizer:
    """One token a byte: any text encodes, nothing is trained."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def tiny_rewriter() -> Rewriter:
    """Really trained, on two prompts alone."""
    rewriter = Rewriter(vocabulary(), choices=2, buckets=256, max_prompt_words=16, width=32, heads=2, layers=1)
    index = {word: id for id, word in enumerate(rewriter.config["words"])}
    prompts = [prompt for prompt in REWRITTEN for _ in range(2)]
    targets = [encode(caption, index) for captions in REWRITTEN.values() for caption in captions]
    optimizer = torch.optim.Adam(rewriter.parameters(), lr=1e-2)
    for _ in range(80):
        loss = rewriter.loss(prompts, targets, [0, 1] * len(REWRITTEN))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return rewriter.eval()


def tiny_captioner() -> Captioner:
    """Really trained, on two clips alone."""
    captioner = Captioner(vocabulary(), channels=CHANNELS, max_frames=3, width=32, heads=2, layers=1, decoder_layers=1)
    index = {word: id for id, word in enumerate(captioner.config["words"])}
    clips = torch.tensor(list(CAPTIONED)).view(-1, 1, 1, 1, 1).expand(-1, CHANNELS, 3, 4, 4)
    targets = [encode(caption, index) for caption in CAPTIONED.values()]
    optimizer = torch.optim.Adam(captioner.parameters(), lr=1e-2)
    for _ in range(80):
        loss = captioner.loss(clips + 0.3 * torch.randn_like(clips), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return captioner.eval()


def tiny_t5(vocabulary: int) -> Any:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def tiny_text_encoder(vocabulary: int) -> Any:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def tiny_image_encoder() -> Any:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).eval()


def tiny_transformer(layers: int = 1, in_channels: int = CHANNELS, **config: Any) -> Any:
    return _louder(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=in_channels,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=48,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
            **config,
        )
    )


def tiny_vae(residual: bool = True, smaller: int = 2) -> Any:
    """Wan 2.2's kind: residual shortcuts, 2x2 patches, 16x smaller. Or Wan 2.1's: neither, and 2x or 8x smaller."""
    # Its norms divide by the length of a few channels; with four of them that comes too close to zero for fp32.
    width = 4 if residual else 6
    style: dict[str, Any] = {"dim_mult": [1, 2], "temperal_downsample": [True]}
    if smaller == 8:
        style = {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]}
    if residual:
        style = {
            "dim_mult": [1, 2, 4, 4],
            "temperal_downsample": [True, True, False],
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 16,
        }
    return _louder(
        AutoencoderKLWan(
            base_dim=width,
            decoder_base_dim=width,
            z_dim=CHANNELS,
            num_res_blocks=1,
            attn_scales=[],
            latents_mean=[0.1 * (index % 5 - 2) for index in range(CHANNELS)],
            latents_std=[0.8 + 0.05 * index for index in range(CHANNELS)],
            **style,
        )
    )


def _louder(model: Any) -> Any:
    """Fresh weights give almost the same output whatever comes in; a test could not tell right from wrong by it."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(1.5)
    return model.eval()

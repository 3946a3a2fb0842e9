"""Stages over a bundle's engines, as the configuration wants them; whether they are replicas or all in one."""

from __future__ import annotations

from models.bundle import Bundle
from serving.pipeline.decoding import EngineDecoder
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.scheduler import Limits
from serving.pipeline.text import EngineTextEncoder
from serving.stage_config import DecoderConfig, DenoiserConfig, TextEncoderConfig

# All of them raise `EngineError` when an engine can't be loaded.


def open_text_encoder(bundle: Bundle, config: TextEncoderConfig) -> EngineTextEncoder:
    return EngineTextEncoder.open(bundle, threads=config.threads, provider=config.provider, plans=config.plans)


def open_denoiser(bundle: Bundle, config: DenoiserConfig) -> EngineDenoiser:
    return EngineDenoiser.open(
        bundle,
        threads=config.threads,
        provider=config.provider,
        plans=config.plans,
        limits=Limits(max_rows=config.max_rows, max_tokens=config.max_tokens),
        max_sessions=config.max_sessions,
    )


def open_decoder(bundle: Bundle, config: DecoderConfig) -> EngineDecoder:
    """Raises `EncoderError` too, when the video encoder can't be had here."""
    return EngineDecoder.open(
        bundle,
        threads=config.threads,
        provider=config.provider,
        plans=config.plans,
        video_encoder=config.video_encoder,
        max_sessions=config.max_sessions,
    )

"""A small causal model whose engine is arithmetic: for what a session asks of an engine, call after call."""

from __future__ import annotations

import numpy as np

from models.bundle import CausalInfo, LatentInfo, LimitsInfo, Manifest, SamplerInfo, TextInfo
from serving.engines.engine import Array
from serving.pipeline.stages import TextEmbedding

MANIFEST = Manifest(
    name="tiny",
    family="wan",
    rollout="causal",
    fps=16,
    chunk_latent_frames=3,
    causal=CausalInfo(sink_chunks=1, window_chunks=2, layers=2, dim=4),
    text=TextInfo(tokenizer="tokenizer.json", max_tokens=8, dim=4),
    latent=LatentInfo(channels=4, spatial=16, temporal=4, patch=2),
    sampler=SamplerInfo(name="renoise", shift=3.0, num_inference_steps=2, guidance_scale=1.0),
    limits=LimitsInfo(
        default_size=(64, 64), min_side=64, max_side=256, size_multiple=16, default_seconds=4, max_seconds=3600
    ),
    graphs={},
    files={},
    versions={},
)


def text(value: float) -> TextEmbedding:
    return TextEmbedding(np.full((8, 4), value, np.float32))


def outputs(feeds: dict[str, Array], scale: float = 0.1) -> dict[str, Array]:
    """Something that depends on the latents, and a cache that tells which chunk and which row wrote it."""
    latents = feeds["latents"]
    rows, _, frames, height, width = latents.shape
    if "write_index" not in feeds:
        return {"velocity": latents * np.float32(scale)}
    written = (1 + feeds["write_index"] + 100.0 * np.arange(rows)).astype(np.float32)
    shape = (rows, 2, 2, frames, height // 2, width // 2, 4)
    chunk_cache = np.broadcast_to(written.reshape(rows, *[1] * 6), shape)
    return {"velocity": latents * np.float32(scale), "chunk_cache": chunk_cache}

"""The four graphs of a Wan checkpoint: example inputs, what is dynamic in them, and the shapes they are verified at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import Dim

from export.onnx import ExportError, Feeds, Graph
from models.wan import (
    DecoderFirst,
    DecoderNext,
    Denoiser,
    TextEncoder,
    UnsupportedCheckpointError,
    WanCheckpoint,
)
from models.wan_causal import CausalDenoiser
from models.window import ContextWindow

# More cells than any model was trained for; the denoiser's RoPE tables set the real bound, see `denoiser`.
MOST = 4096


@dataclass(frozen=True)
class Geometry:
    """What the decoder does to sizes, read off its outputs instead of trusting the config."""

    channels: int
    spatial: int
    temporal: int
    cache_channels: tuple[int, ...]
    cache_scales: tuple[int, ...]

    @classmethod
    def probe(cls, checkpoint: WanCheckpoint) -> Geometry:
        channels = int(checkpoint.vae.config.z_dim)
        latents = torch.zeros(1, channels, 1, 2, 2)
        with torch.no_grad():
            _, pixels, *caches = DecoderFirst(checkpoint.vae)(latents)
            following = DecoderNext(checkpoint.vae)(latents, *caches)[1]
        return cls(
            channels=channels,
            spatial=pixels.shape[-1] // 2,
            temporal=following.shape[2],
            cache_channels=tuple(cache.shape[1] for cache in caches),
            cache_scales=tuple(cache.shape[-1] // 2 for cache in caches),
        )


def text_encoder(checkpoint: WanCheckpoint, max_tokens: int) -> Graph:
    vocabulary = int(checkpoint.text_encoder.config.vocab_size)
    random = torch.Generator().manual_seed(1)

    def feeds(lengths: Sequence[int], tokens: int) -> Feeds:
        mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
        return {"input_ids": torch.randint(2, vocabulary, mask.shape, generator=random) * mask, "attention_mask": mask}

    shape = {0: Dim("batch", min=1, max=1024), 1: Dim("tokens", min=1, max=max(2, max_tokens))}
    return Graph(
        name="text_encoder",
        module=TextEncoder(checkpoint.text_encoder),
        example=feeds([5, min(8, max_tokens)], min(8, max_tokens)),
        outputs=("hidden_states",),
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        weights="text_encoder.weights",
        cases=(feeds([1], max_tokens), feeds([3, max_tokens, 1], max_tokens), feeds([4, 5], 5)),
    )


def denoiser(checkpoint: WanCheckpoint, max_tokens: int) -> Graph:
    config = checkpoint.transformer.config
    dim, channels = int(config.text_dim), int(config.in_channels)
    patch_frames, patch_height, patch_width = config.patch_size
    random = torch.Generator().manual_seed(2)

    def feeds(batch: int, frames: int, rows: int, columns: int, tokens: int) -> Feeds:
        size = (frames * patch_frames, rows * patch_height, columns * patch_width)
        return {
            "latents": torch.randn(batch, channels, *size, generator=random),
            "timestep": torch.rand(batch, generator=random) * 1000,
            "encoder_hidden_states": torch.randn(batch, tokens, dim, generator=random),
        }

    batch, longest = Dim("batch", min=1, max=1024), int(config.rope_max_seq_len)
    return Graph(
        name="denoiser",
        module=(module := Denoiser(checkpoint.transformer)),
        example=feeds(2, 3, 3, 2, min(8, max_tokens)),
        outputs=("velocity",),
        dynamic_shapes={
            "latents": {
                0: batch,
                2: _multiple(patch_frames, "frames", longest),
                3: _multiple(patch_height, "rows", longest),
                4: _multiple(patch_width, "columns", longest),
            },
            "timestep": {0: batch},
            "encoder_hidden_states": {0: batch, 1: Dim("tokens", min=1, max=MOST)},
        },
        weights="denoiser.weights",
        cases=(
            feeds(1, 1, 2, 2, max_tokens),
            feeds(3, 4, 1, 3, max_tokens),
            feeds(2, 9, 4, 4, max_tokens),
            feeds(1, 5, 3, 5, max_tokens),
        ),
        exportable=module.exportable(),
    )


def causal_denoiser(checkpoint: WanCheckpoint, max_tokens: int, window: ContextWindow) -> Graph:
    """The denoiser of one chunk over a cache. Raises `ExportError` for a window that the checkpoint can't have."""
    config = checkpoint.transformer.config
    dim, channels = int(config.text_dim), int(config.in_channels)
    _, patch_height, patch_width = config.patch_size
    try:
        module = CausalDenoiser(checkpoint.transformer, window)
    except UnsupportedCheckpointError as error:
        raise ExportError(str(error)) from error
    random = torch.Generator().manual_seed(5)

    def feeds(written: Sequence[int], frames: int, rows: int, columns: int, tokens: int) -> Feeds:
        batch = len(written)
        latents = torch.randn(batch, channels, frames, rows * patch_height, columns * patch_width, generator=random)
        return {
            "latents": latents,
            "timestep": torch.rand(batch, generator=random) * 1000,
            "encoder_hidden_states": torch.randn(batch, tokens, dim, generator=random),
            "cache": torch.randn(module.empty_cache(batch, latents).shape, generator=random),
            "write_index": torch.tensor(written),
        }

    batch, longest = Dim("batch", min=1, max=1024), int(config.rope_max_seq_len)
    rows, columns = (Dim(name, min=1, max=longest) for name in ("rows", "columns"))
    full, most = window.capacity, window.chunk_frames
    return Graph(
        name="denoiser",
        module=module,
        example=feeds([full, 2], min(2, most), 3, 2, min(8, max_tokens)),
        outputs=("velocity", "chunk_cache"),
        dynamic_shapes={
            "latents": {
                0: batch,
                2: Dim("frames", min=1, max=most) if most > 1 else None,
                3: patch_height * rows if patch_height > 1 else rows,
                4: patch_width * columns if patch_width > 1 else columns,
            },
            "timestep": {0: batch},
            "encoder_hidden_states": {0: batch, 1: Dim("tokens", min=1, max=MOST)},
            "cache": {0: batch, 4: rows, 5: columns},
            "write_index": {0: batch},
        },
        weights="denoiser.weights",
        # An empty cache, one that is partly filled, one just full, and rings that have gone round, far and farther.
        cases=(
            feeds([0], most, 2, 2, max_tokens),
            feeds([1, full - 1, full], 1, 1, 3, max_tokens),
            feeds([full + 1, 0, full + 2, 3], most, 4, 4, max_tokens),
            feeds([100_000], most, 3, 5, max_tokens),
        ),
    )


def _multiple(factor: int, name: str, most: int) -> object:
    dim = Dim(name, min=1, max=most)
    return dim if factor == 1 else factor * dim


def decoders(checkpoint: WanCheckpoint, geometry: Geometry) -> tuple[Graph, Graph]:
    """`decoder_first` and `decoder_next`; they share one weight file."""
    random = torch.Generator().manual_seed(3)
    numbers = [f"{index:02}" for index in range(len(geometry.cache_scales))]

    def latents(batch: int, frames: int, height: int, width: int) -> Tensor:
        return torch.randn(batch, geometry.channels, frames, height, width, generator=random)

    def cached(batch: int, frames: int, height: int, width: int) -> Feeds:
        caches = {
            f"cache_{number}": torch.randn(batch, channels, 2, height * scale, width * scale, generator=random)
            for number, channels, scale in zip(numbers, geometry.cache_channels, geometry.cache_scales, strict=True)
        }
        return {"latents": latents(batch, frames, height, width), **caches}

    batch, height, width = (Dim(name, min=1, max=MOST) for name in ("batch", "height", "width"))
    cell = {0: batch, 3: height, 4: width}
    first = Graph(
        name="decoder_first",
        module=DecoderFirst(checkpoint.vae),
        example={"latents": latents(2, 1, 3, 4)},
        outputs=("frames", "pixels", *(f"cache_{number}" for number in numbers)),
        dynamic_shapes={"latents": cell},
        weights="decoder.weights",
        cases=tuple({"latents": latents(*shape)} for shape in [(1, 1, 4, 4), (3, 1, 2, 5), (1, 1, 1, 1)]),
    )
    following = Graph(
        name="decoder_next",
        module=DecoderNext(checkpoint.vae),
        example=cached(2, 3, 3, 4),
        outputs=("frames", "pixels", *(f"next_cache_{number}" for number in numbers)),
        dynamic_shapes={
            "latents": cell | {2: Dim("frames", min=1, max=MOST)},
            "caches": tuple(
                {0: batch, 3: height * scale if scale > 1 else height, 4: width * scale if scale > 1 else width}
                for scale in geometry.cache_scales
            ),
        },
        weights="decoder.weights",
        cases=tuple(cached(*shape) for shape in [(1, 1, 4, 4), (3, 2, 2, 5), (1, 4, 1, 3)]),
    )
    return first, following

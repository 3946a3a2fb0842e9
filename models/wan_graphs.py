"""The Wan family's graphs: what is dynamic in each, and where it is tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from models.bundle import GraphName
from models.families import Plan, UnsupportedCheckpointError
from models.graph import MOST, Feeds, Graph, multiple
from models.wan import (
    TEXT_BESIDE_IMAGE,
    DecoderFirst,
    DecoderNext,
    Denoiser,
    ImageEncoder,
    PicturedDenoiser,
    TextEncoder,
    WanCheckpoint,
)
from models.wan_causal import CausalDenoiser
from models.window import ContextWindow

# Latent frames, height and width.
Size = tuple[int, int, int]


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
        cases=(
            feeds([1], max_tokens),
            feeds([3, max_tokens, 1], max_tokens),
            feeds([min(4, max_tokens), 5], 5),
            feeds([1], 1),
        ),
        stored=checkpoint.stored.get("text_encoder"),
    )


def denoiser(
    checkpoint: WanCheckpoint, max_tokens: int, largest: Size, name: GraphName = "denoiser", *, mask: int = 0
) -> Graph:
    """`mask` channels say that a picture is given, and as many as the latents have show it."""
    config = checkpoint.transformer.config
    dim, channels = int(config.text_dim), int(config.out_channels)
    clip = checkpoint.image_encoder.config if checkpoint.image_encoder is not None else None
    if clip is not None and max_tokens != TEXT_BESIDE_IMAGE:
        raise UnsupportedCheckpointError(f"`max_tokens` must be {TEXT_BESIDE_IMAGE} beside an image encoder.")
    patch_frames, patch_height, patch_width = config.patch_size
    random, by_frame = torch.Generator().manual_seed(2), checkpoint.expand_timesteps
    if by_frame and patch_frames != 1:
        raise UnsupportedCheckpointError("One timestep a frame needs patches of one latent frame.")

    def feeds(batch: int, frames: int, rows: int, columns: int, tokens: int) -> Feeds:
        size = (frames * patch_frames, rows * patch_height, columns * patch_width)
        steps = torch.rand((batch, size[0]) if by_frame else (batch,), generator=random) * 1000
        if by_frame:
            steps[::2, 0] = 0.0  # as when the first frame is given
        given = {
            "latents": torch.randn(batch, channels, *size, generator=random),
            "timestep": steps,
            "encoder_hidden_states": torch.randn(batch, tokens, dim, generator=random),
        }
        if mask:
            given["condition"] = torch.randn(batch, mask + channels, *size, generator=random)
        if clip is not None:
            seen = (batch, 1 + (clip.image_size // clip.patch_size) ** 2, clip.hidden_size)
            given["image_hidden_states"] = torch.randn(seen, generator=random)
        return given

    batch, longest = Dim("batch", min=1, max=1024), int(config.rope_max_seq_len)
    most_frames, most_rows, most_columns = (
        min(math.ceil(size / patch), longest) for size, patch in zip(largest, config.patch_size, strict=True)
    )
    frames = multiple(patch_frames, "frames", longest)
    cells = {
        0: batch,
        2: frames,
        3: multiple(patch_height, "rows", longest),
        4: multiple(patch_width, "columns", longest),
    }
    kind = PicturedDenoiser if mask else Denoiser
    shapes: dict[str, Any] = {
        "latents": cells,
        "timestep": {0: batch, 1: frames} if by_frame else {0: batch},
        # Beside an image it has one length, by which the two are told apart.
        "encoder_hidden_states": {0: batch} if clip else {0: batch, 1: Dim("tokens", min=1, max=MOST)},
        "condition": cells,
        "image_hidden_states": {0: batch},
    }
    example = feeds(2, 3, 3, 2, max_tokens if clip else min(8, max_tokens))
    return Graph(
        name=name,
        module=(module := kind(checkpoint.transformer, by_frame=by_frame)),
        example=example,
        outputs=("velocity",),
        dynamic_shapes={name: shapes[name] for name in example},
        weights=f"{name}.weights",
        cases=(
            feeds(1, 1, 2, 2, max_tokens),
            feeds(3, 4, 1, 3, max_tokens),
            feeds(2, 9, 4, 4, max_tokens),
            feeds(1, 5, 3, 5, max_tokens),
            feeds(1, most_frames, most_rows, most_columns, max_tokens),
        ),
        exportable=module.exportable(),
        stored=checkpoint.stored.get("transformer"),
    )


def causal_denoiser(checkpoint: WanCheckpoint, plan: Plan, window: ContextWindow, largest: tuple[int, ...]) -> Graph:
    """The denoiser of one chunk over a cache, tried up to `largest` height and width.

    Raises `UnsupportedCheckpointError` for a window that the checkpoint can't have.
    """
    config = checkpoint.transformer.config
    dim, channels = int(config.text_dim), int(config.in_channels)
    _, patch_height, patch_width = config.patch_size
    module, max_tokens = CausalDenoiser(checkpoint.transformer, window, plan.positions), plan.max_tokens
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
            feeds([full], most, largest[0] // patch_height, largest[1] // patch_width, max_tokens),
        ),
        stored=checkpoint.stored.get("transformer"),
    )


def decoders(checkpoint: WanCheckpoint, geometry: Geometry, largest: tuple[int, int]) -> tuple[Graph, Graph]:
    """`decoder_first` and `decoder_next`, tried up to `largest` height and width; they share one weight file."""
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
        cases=tuple(
            {"latents": latents(*shape)} for shape in [(1, 1, 4, 4), (3, 1, 2, 5), (1, 1, 1, 1), (1, 1, *largest)]
        ),
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
        cases=tuple(cached(*shape) for shape in [(1, 1, 4, 4), (3, 2, 2, 5), (1, 4, 1, 3), (1, 1, *largest)]),
    )
    return first, following


def image_encoder(checkpoint: WanCheckpoint, side: int) -> Graph:
    """CLIP's tokens of a picture."""
    random = torch.Generator().manual_seed(4)

    def feeds(batch: int) -> Feeds:
        return {"pixels": torch.randint(0, 256, (batch, side, side, 3), generator=random, dtype=torch.uint8)}

    return Graph(
        name="image_encoder",
        module=ImageEncoder(checkpoint.image_encoder, checkpoint.image_processor),
        example=feeds(2),
        outputs=("image_hidden_states",),
        dynamic_shapes={"pixels": {0: Dim("batch", min=1, max=1024)}},
        weights="image_encoder.weights",
        cases=(feeds(1), feeds(3)),
    )

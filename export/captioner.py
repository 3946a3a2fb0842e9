"""The captioner's graphs, if the checkpoint's directory has a `captioner/` folder; and those of the VAE's encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim

from export.onnx import ExportError
from export.parity import TOLERANCE
from export.words import word_decoder
from models.bundle import CaptionerInfo, LatentInfo
from models.graph import MOST, Feeds, Graph
from models.wan import WanCheckpoint
from models.wan_encoder import GROUP, EncoderFirst, EncoderNext

CAPTIONER = "captioner"
# Frames a video, and (batch, height, width) in latent cells, at which streamed encoding is compared with `vae.encode`.
LENGTHS = (1, 5, 17)
SIZES = ((1, 4, 6), (2, 3, 2))


def captioner(checkpoint: Path, latent: LatentInfo) -> tuple[CaptionerInfo, tuple[Graph, Graph]] | None:
    """The manifest's section and both graphs, or None. Raises `ExportError` for a folder that can't be read."""
    folder = checkpoint / CAPTIONER
    if not folder.is_dir():
        return None
    # Other checkpoints need nothing of the bundled model's training code.
    from models.mini.captioner import PATCH, Captioner
    from models.mini.words import MAX_WORDS

    try:
        module = Captioner.load(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ExportError(f"{folder} can't be read: {error}") from error
    config = module.config
    if config["channels"] != latent.channels:
        raise ExportError(f"The captioner reads {config['channels']} latent channels, the VAE has {latent.channels}.")
    most: int = config["max_frames"]
    random = torch.Generator().manual_seed(7)

    def feeds(batch: int, frames: int, rows: int, columns: int) -> Feeds:
        shape = (batch, latent.channels, frames, rows * PATCH, columns * PATCH)
        return {"latents": torch.randn(shape, generator=random)}

    side = {3: PATCH * Dim("rows", min=1, max=64), 4: PATCH * Dim("columns", min=1, max=64)}
    encoder = Graph(
        name="captioner_encoder",
        module=module.encoder,
        example=feeds(2, 3, 3, 4),
        outputs=("memory", "memory_mask"),
        dynamic_shapes={"latents": {0: Dim("batch", min=1, max=1024), 2: Dim("frames", min=1, max=most), **side}},
        weights="captioner.weights",
        cases=(feeds(1, 1, 1, 2), feeds(3, most, 4, 4), feeds(1, 2, 5, 3)),
    )
    info = CaptionerInfo(words=tuple(config["words"]), starts=1, max_words=MAX_WORDS, max_frames=most)
    return info, (encoder, word_decoder("captioner_decoder", module.decoder, config["width"], MOST))


def encoders(checkpoint: WanCheckpoint, latent: LatentInfo) -> tuple[Graph, Graph]:
    """`encoder_first` and `encoder_next`, which share one weight file.

    Frames are float32 from 0 to 255: the grey behind a picture (`models.pictures`) is between two whole numbers.
    """
    random = torch.Generator().manual_seed(8)
    spatial = latent.spatial
    first_module, next_module = EncoderFirst(checkpoint.vae), EncoderNext(checkpoint.vae)

    def frames(batch: int, count: int, height: int, width: int) -> torch.Tensor:
        shape = (batch, count, height * spatial, width * spatial, 3)
        return torch.randint(0, 256, shape, generator=random).to(torch.float32)

    with torch.no_grad():
        _, *shown = first_module(frames(1, 1, 2, 2))
    numbers = [f"{index:02}" for index in range(len(shown))]

    def cached(batch: int, height: int, width: int) -> Feeds:
        caches = {
            f"cache_{number}": torch.randn(
                *(batch, cache.shape[1], cache.shape[2]),
                *(height * cache.shape[3] // 2, width * cache.shape[4] // 2),
                generator=random,
            )
            for number, cache in zip(numbers, shown, strict=True)
        }
        return {"frames": frames(batch, GROUP, height, width), **caches}

    batch, height, width = (Dim(name, min=1, max=256) for name in ("batch", "height", "width"))

    def side(dim: Any, scale: int) -> Any:
        return scale * dim if scale > 1 else dim

    pixels = {0: batch, 2: side(height, spatial), 3: side(width, spatial)}
    first = Graph(
        name="encoder_first",
        module=first_module,
        example={"frames": frames(2, 1, 3, 4)},
        outputs=("latents", *(f"cache_{number}" for number in numbers)),
        dynamic_shapes={"frames": pixels},
        weights="encoder.weights",
        cases=tuple({"frames": frames(*shape)} for shape in [(1, 1, 4, 4), (3, 1, 2, 5), (1, 1, 1, 1)]),
    )
    following = Graph(
        name="encoder_next",
        module=next_module,
        example=cached(2, 3, 4),
        outputs=("latents", *(f"next_cache_{number}" for number in numbers)),
        dynamic_shapes={
            "frames": pixels,
            "caches": tuple(
                {0: batch, 3: side(height, cache.shape[3] // 2), 4: side(width, cache.shape[4] // 2)} for cache in shown
            ),
        },
        weights="encoder.weights",
        cases=tuple(cached(*shape) for shape in [(1, 4, 4), (3, 2, 5), (1, 1, 3)]),
    )
    return first, following


def encoding_error(checkpoint: WanCheckpoint, first: Any, following: Any, latent: LatentInfo) -> float:
    """The largest absolute error of streamed encoding against `vae.encode` of the whole. Raises `ExportError`."""
    vae = checkpoint.vae
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    random = torch.Generator().manual_seed(9)
    worst = 0.0
    for length in LENGTHS:
        for batch, height, width in SIZES:
            shape = (batch, length, height * latent.spatial, width * latent.spatial, 3)
            frames = torch.randint(0, 256, shape, generator=random).to(torch.float32)
            with torch.no_grad():
                pixels = frames.permute(0, 4, 1, 2, 3) / 127.5 - 1
                whole = ((vae.encode(pixels).latent_dist.mode() - mean) / std).numpy()
            streamed = _streamed(first, following, frames.numpy())
            worst = max(worst, float(np.abs(streamed - whole).max()) if streamed.shape == whole.shape else np.inf)
            if not worst <= TOLERANCE:
                raise ExportError(f"Encoding {length} frames in groups is off by {worst:.2g} against one go.")
    return worst


def _streamed(first: Any, following: Any, frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    caches: Sequence[str] = [output.name for output in first.get_outputs() if output.name != "latents"]
    latents, *values = first.run(["latents", *caches], {"frames": frames[:, :1]})
    made = [latents]
    for start in range(1, frames.shape[1], GROUP):
        feeds = {"frames": frames[:, start : start + GROUP], **dict(zip(caches, values, strict=True))}
        latents, *values = following.run(["latents", *(f"next_{name}" for name in caches)], feeds)
        made.append(latents)
    return np.concatenate(made, axis=2)

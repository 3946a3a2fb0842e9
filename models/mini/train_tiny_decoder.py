"""The tiny decoder's training: cached latents back to the clips that they are of.

It learns from the rendered pictures, not from the VAE's: so it isn't taught the VAE's own errors.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from models.mini.latents import BLOCK, LONG, clips_of
from models.mini.networks import LATENT_CHANNELS
from models.mini.render import render
from models.mini.train_dit import Normalised
from models.mini.train_vae import to_tensor
from models.mini.training import Run, train
from models.tiny_decoder import TinyDecoder

# A fifth of the VAE's decoder in time: see `models/mini/README.md`.
WIDTHS, BLOCKS, STRIDES, PATCH = (64, 64, 32, 16), 2, (1, 2, 2), 2
_WINDOW = 6  # latent frames
_WARM = 2  # of a window in the middle of a clip: as long as they fill the memories they aren't judged
# Latent cells of a crop each way, and clips a step. In the last part of the time pictures are whole, and one a step:
# until then a crop's edge looks like the picture's.
_CROP, _BATCH, _WHOLE_FROM = 4, 6, 0.75
_CLIPS = 320  # rendered again, and held


def build_tiny_decoder() -> TinyDecoder:
    return TinyDecoder(LATENT_CHANNELS, WIDTHS, BLOCKS, STRIDES, PATCH)


def _pictures(count: int) -> NDArray[np.uint8]:
    """The clips `[count, frames, height, width, 3]` that the first cached latents are of."""
    blocks = [clips_of(first, LONG)[1] for first in range(0, count, BLOCK)]
    return np.stack([render(scene) for block in blocks for scene in block])[:count]


def _crop(
    latents: torch.Tensor, shown: NDArray[np.uint8], spatial: int, rng: np.random.Generator
) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """The one of two places where more is to be seen."""

    def crop() -> tuple[torch.Tensor, NDArray[np.uint8]]:
        row, column = rng.integers(latents.shape[-1] - _CROP + 1, size=2)
        top, left, side = row * spatial, column * spatial, _CROP * spatial
        part = latents[..., row : row + _CROP, column : column + _CROP]
        return part, shown[:, top : top + side, left : left + side]

    return max(crop(), crop(), key=lambda found: float(found[1][:: len(shown)].std()))


def train_tiny_decoder(run: Run) -> None:
    """Wants latents of `LONG` frames."""
    data = Normalised(run.folder, LONG)
    held = min(len(data.data.latents), _CLIPS) // run.workers
    pictures = _pictures(held)
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 9])
    decoder = build_tiny_decoder()

    def step(_index: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        start = 0 if rng.random() < 0.4 else int(rng.integers(1, data.data.latents.shape[2] - _WINDOW + 1))
        # The first latent frame is one picture.
        first = 1 + decoder.temporal * (start - 1 + _WARM) if start else 0
        unseen = decoder.temporal * _WARM if start else decoder.temporal - 1
        count = decoder.temporal * _WINDOW - unseen
        rows, wanted = [], []
        for clip in rng.integers(held, size=1 if progress > _WHOLE_FROM else _BATCH):
            latents = data.normalised(np.array([clip]))[0, :, start : start + _WINDOW]
            shown = pictures[clip, first : first + count]
            if progress <= _WHOLE_FROM:
                latents, shown = _crop(latents, shown, decoder.spatial, rng)
            rows.append(latents)
            wanted.append(shown)
        made, _ = decoder.stream(torch.stack(rows), None)
        error = made[:, :, unseen:] - to_tensor(np.stack(wanted)).add(1).div(2)
        loss = error.square().mean() + 0.05 * error.abs().mean()
        return loss, {"db": -10 * float(torch.log10(error.detach().square().mean()))}

    train(run, {"tiny_decoder": decoder}, step, lambda _step: {})

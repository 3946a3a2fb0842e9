"""The tiny decoder's training: cached latents back to the clips that they are of.

It learns from the rendered pictures, not from the VAE's: so it isn't taught the VAE's own errors.
"""

from __future__ import annotations

import numpy as np
import torch

from models.mini.clips import BLOCK, LONG, clips_of
from models.mini.device import placed
from models.mini.networks import LATENT_CHANNELS
from models.mini.pool import as_floats, cut
from models.mini.render import render
from models.mini.scene import HEIGHT
from models.mini.train_dit import Normalised
from models.mini.training import Run, train
from models.tiny_decoder import TinyDecoder

# A fifth of the VAE's decoder in time: see `models/mini/README.md`.
WIDTHS, BLOCKS, STRIDES, PATCH = (64, 64, 32, 16), 2, (1, 2, 2), 2
_WINDOW = 6  # latent frames
_WARM = 2  # of a window in the middle of a clip: as long as they fill the memories they aren't judged
# Latent cells of a crop each way. In the last part of the time pictures are whole, and fewer a step: until then a
# crop's edge looks like the picture's.
_CROP, _WHOLE_FROM = 4, 0.75
_CLIPS = 320  # rendered again, and held


def build_tiny_decoder() -> TinyDecoder:
    return TinyDecoder(LATENT_CHANNELS, WIDTHS, BLOCKS, STRIDES, PATCH)


def _pictures(run: Run, count: int) -> torch.Tensor:
    """The clips uint8 `[count, frames, height, width, 3]` that the first cached latents are of."""
    if LONG in run.rendered:
        return placed(run.rendered[LONG].pictures[:count], run.device)
    blocks = [clips_of(first, LONG)[1] for first in range(0, count, BLOCK)]
    return placed(np.stack([render(scene) for block in blocks for scene in block])[:count], run.device)


def _cells(latents: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
    """Crops `[clips, channels, frames, _CROP, _CROP]` that begin at these cells `[clips, 2]`."""
    across = torch.arange(_CROP, device=latents.device)
    y, x = (corner[:, axis, None] + across for axis in (0, 1))
    clip = torch.arange(len(latents), device=latents.device)[:, None, None]
    return latents[clip, :, :, y[:, :, None], x[:, None, :]].permute(0, 3, 4, 1, 2)


def train_tiny_decoder(run: Run) -> None:
    """Wants latents of `LONG` frames."""
    data, sizes = Normalised(run.folder, LONG, run.device), run.recipe
    # What is rendered already is held all; what this would have to render isn't.
    held = data.count if LONG in run.rendered else min(data.count, _CLIPS) // run.workers
    pictures = _pictures(run, held)
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 9])
    decoder = build_tiny_decoder().to(run.device)

    def step(_index: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        start = 0 if rng.random() < 0.4 else int(rng.integers(1, data.frames - _WINDOW + 1))
        # The first latent frame is one picture.
        first = 1 + decoder.temporal * (start - 1 + _WARM) if start else 0
        unseen = decoder.temporal * _WARM if start else decoder.temporal - 1
        count = decoder.temporal * _WINDOW - unseen
        whole = progress > _WHOLE_FROM
        chosen = rng.integers(held, size=sizes.whole if whole else sizes.part)
        latents = data.normalised(chosen)[:, :, start : start + _WINDOW]
        clip, at = placed(chosen, run.device), torch.full((len(chosen),), first, device=run.device)
        if whole:
            corner = torch.zeros(len(chosen), 2, dtype=torch.int64, device=run.device)
            shown = cut(pictures, clip, at, corner, count, HEIGHT)
        else:
            side, room = _CROP * decoder.spatial, latents.shape[-1] - _CROP
            # Of two places the one where more is to be seen.
            one, other = placed(rng.integers(room + 1, size=(2, len(chosen), 2)), run.device)
            seen, beside = (
                cut(pictures, clip, at, place * decoder.spatial, 1, side).float().std((1, 2, 3, 4))
                for place in (one, other)
            )
            corner = torch.where((seen > beside)[:, None], one, other)
            latents = _cells(latents, corner)
            shown = cut(pictures, clip, at, corner * decoder.spatial, count, side)
        made, _ = decoder.stream(latents, None)
        error = made[:, :, unseen:] - as_floats(shown).add(1).div(2)
        loss = error.square().mean() + 0.05 * error.abs().mean()
        return loss, {"db": -10 * torch.log10(error.detach().square().mean())}

    train(run, {"tiny_decoder": decoder}, step, lambda _step: {})

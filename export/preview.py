"""A video's colours without its decoder: the linear map from a latent cell to RGB that comes nearest.

Fitted by least squares to what the decoder makes of noise, which has the mean and the spread that normalised latents
have; so it needs no pictures, and works alike for every VAE. It is done once, here, and not by each decoder that is
opened: a TensorRT plan takes only its own shapes, and who shows the preview needs no engine.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from export import parity
from models.bundle import Manifest, PreviewInfo

# Latent cells each way of one picture, and how many samples there are at least for each channel.
_SIDE, _SAMPLES = 8, 20
# Of the samples' variance: what is known of a channel that hardly shows is little.
_RIDGE = 0.1


def fit(manifest: Manifest, folder: Path) -> PreviewInfo:
    """By the bundle's own first decoder graph."""
    latent = manifest.latent
    frames = latent.first if latent.streaming == "exact" else manifest.chunk_latent_frames
    session = parity.open_session(folder / manifest.graphs["decoder_first"].file)
    random = np.random.default_rng(0)
    cells, colours = [], []
    for _ in range(math.ceil(_SAMPLES * latent.channels / _SIDE**2)):
        shape = (1, latent.channels, frames, _SIDE, _SIDE)
        feeds = {"latents": random.standard_normal(shape, dtype=np.float32)}
        if manifest.decodes_with_noise:
            feeds["noise"] = random.standard_normal(shape, dtype=np.float32)
        (made,) = session.run(["frames"], feeds)
        picture = made[0, 0].reshape(_SIDE, latent.spatial, _SIDE, latent.spatial, 3).mean(axis=(1, 3)) / 255
        cells.append(feeds["latents"][0, :, 0].reshape(latent.channels, -1).T)
        colours.append(picture.reshape(-1, 3))
    samples, targets = np.concatenate(cells).astype(np.float64), np.concatenate(colours)
    bias = targets.mean(axis=0)
    gram = samples.T @ samples + _RIDGE * len(samples) * np.eye(latent.channels)
    factors = np.linalg.solve(gram, samples.T @ (targets - bias))
    return PreviewInfo(
        factors=tuple([_rounded(row) for row in factors]),
        bias=_rounded(bias),
    )


def _rounded(row: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 5) for value in row)
    return red, green, blue

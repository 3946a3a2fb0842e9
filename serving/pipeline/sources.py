"""What a video's latents begin from: its own first frames, a draft of all of it, or a picture seen as channels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.bundle import Manifest
from models.pictures import condition_of
from models.samplers import SamplerTable
from serving.pipeline.stages import DenoiseRequest

Floats = NDArray[np.float32]

# How far from its last given frame, standing still, what a model makes begins that sees no frame without noise: after a
# picture, and after a moving one. At full noise it would settle where things are without having seen where they were.
# With the bundled model a ball that was moving jumps and leaves a ghost at 1, a bit at 0.8, and rolls on at 0.65;
# a cube in a picture loses its shape at 1, and bounces less at 0.65 than at 0.8.
PICTURE_STRENGTH, GOES_ON_STRENGTH = 0.8, 0.65


class Source:
    """The latents that a request begins from: its own first frames, a draft of all of them, or none."""

    def __init__(self, request: DenoiseRequest, shape: tuple[int, int, int, int], *, clean: bool) -> None:
        """`clean` says that the model sees what is given as it is, without noise.

        Raises `ValueError` for latents that don't fit the video's.
        """
        self._latents = None if request.source is None else request.source.latents
        self._draft = request.spec.strength is not None
        self._goes_on = False
        self.frames = 0
        self.strength = 1.0 if request.spec.strength is None else request.spec.strength
        if self._latents is None:
            return
        channels, frames, *sides = shape
        given = self._latents.shape
        if (given[0], *given[2:]) != (channels, *sides):
            raise ValueError(f"{request.video_id}: the source's latents are {given}, the video's {shape}")
        if self._draft and given[1] != frames:
            raise ValueError(f"{request.video_id}: a draft has {given[1]} latent frames, the video {frames}")
        if not self._draft and given[1] >= frames:
            raise ValueError(f"{request.video_id}: {given[1]} latent frames are given, so none is left to make")
        self.frames = 0 if self._draft else given[1]
        self._goes_on = self.frames > 0 and not clean
        if self._goes_on:
            self.strength = GOES_ON_STRENGTH if self.frames > 1 else PICTURE_STRENGTH

    def within(self, first: int, noise: Floats, *, clean: bool = False) -> Held:
        """What of it lies in the frames that `noise` is for, which begin with the latent frame `first`.

        `clean`: frames that are given have no noise at any step, as a model knows them that was trained with pictures.
        """
        if self._latents is None:
            return Held(None, None, noise)
        part = self._latents[:, first : first + noise.shape[1]]
        if self._draft:
            return Held(None, part, noise)
        still = np.repeat(part[:, -1:], noise.shape[1] - part.shape[1], axis=1) if self._goes_on else None
        return Held(part, None if still is None else np.concatenate([part, still], axis=1), noise, clean=clean)


class Held:
    """What a run of frames begins from. Frames that are given are put back after every step, at its noise level
    (the known region of RePaint, arXiv 2201.09865, without its resampling); a draft only begins there (SDEdit,
    arXiv 2108.01073)."""

    def __init__(self, kept: Floats | None, draft: Floats | None, noise: Floats, *, clean: bool = False) -> None:
        self._kept, self._draft, self._clean = kept, draft, clean
        self.frames = 0 if kept is None else kept.shape[1]
        self._noise = noise[:, : self.frames].copy()
        self.whole = kept is not None and self.frames == noise.shape[1]

    def begin(self, table: SamplerTable, noise: Floats) -> Floats:
        """The sampler's first state float32 `[1 + history, …]`, with an empty history."""
        state = np.zeros((1 + table.history, *noise.shape), np.float32)
        sigma = table.sigmas[0]
        state[0] = noise if self._draft is None else (1 - sigma) * self._draft + sigma * noise
        self.put(state, float(sigma))
        return state

    def put(self, state: Floats, sigma: float) -> None:
        """Put what is given back into a state at this noise level."""
        if self._kept is not None:
            level = np.float32(0 if self._clean else sigma)
            state[0, :, : self.frames] = (1 - level) * self._kept + level * self._noise


def seen_picture(manifest: Manifest, request: DenoiseRequest, shape: tuple[int, int, int, int]) -> dict[str, Floats]:
    """The inputs, but for their rows, that show a picture to a model that takes it as channels. Raises `ValueError`."""
    if not manifest.pictured:
        return {}
    source = request.source
    if source is None or request.spec.strength is not None or source.latents.shape != shape:
        raise ValueError(f"{request.video_id}: {manifest.name} makes a video of one picture, and of nothing else")
    seen: dict[str, Floats] = {"condition": condition_of(source.latents, manifest.latent.temporal)}
    if manifest.image is not None:
        if source.hidden_states is None:
            raise ValueError(f"{request.video_id}: {manifest.name} needs the picture's hidden states")
        seen["image_hidden_states"] = source.hidden_states
    return seen

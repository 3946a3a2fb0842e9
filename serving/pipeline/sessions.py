"""What a video needs between two engine calls: the inputs of its rows, and what becomes of their outputs.

One class for each rollout. The denoiser's loop knows only `Session`: it puts the rows of several sessions into one call
and hands each its part of the outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.bundle import GraphName, Manifest
from models.samplers import SamplerTable, advance
from serving.engines.engine import HOST, Array, Arrays
from serving.pipeline.geometry import chunk_from, latent_shape
from serving.pipeline.stages import DenoiseRequest, LatentChunk

Floats = NDArray[np.float32]


def open_session(manifest: Manifest, request: DenoiseRequest, arrays: Arrays = HOST) -> Session:
    """`arrays` make what is kept between calls. Raises `ValueError` for what this model's rollout can't honour."""
    if manifest.rollout == "causal":
        return CausalSession(manifest, request, arrays)
    return BidirectionalSession(manifest, request)


class Session(ABC):
    """One video being denoised. Every call holds `rows` rows of it: the prompt's, and when guided the negative's."""

    def __init__(self, manifest: Manifest, request: DenoiseRequest) -> None:
        spec, sampler = request.spec, manifest.sampler
        self._seed = spec.seed
        self._patch = manifest.latent.patch
        self._chunk_frames = manifest.chunk_latent_frames
        self._latent_shape = latent_shape(manifest, spec)
        tokens = math.prod(self._latent_shape[1:]) // self._patch**2
        self._table = sampler.table(spec.num_inference_steps, spec.guidance_scale, tokens, spec.sampler)
        self._boundary = manifest.experts.boundary_timestep if manifest.experts else 0.0
        self._texts = [request.conditional.hidden_states]
        if spec.guidance_scale > 1:
            if request.unconditional is None:
                raise ValueError(f"{request.video_id}: guidance needs an unconditional embedding")
            self._texts.append(request.unconditional.hidden_states)
        self.calls_done = 0

    @property
    def rows(self) -> int:
        return len(self._texts)

    @property
    def chunks(self) -> int:
        return -(-self._latent_shape[1] // self._chunk_frames)

    @property
    def tokens_per_row(self) -> int:
        """How many tokens each row of the next call computes."""
        _, frames, height, width = self.shape
        return frames * (height // self._patch) * (width // self._patch)

    @property
    @abstractmethod
    def calls(self) -> int:
        """How many engine calls the video takes."""

    @property
    def graph(self) -> GraphName:
        """Which denoiser the next call is for: a model may have another for little noise."""
        return "denoiser"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """`(channels, frames, height, width)` of a row's latents in the next call."""

    @abstractmethod
    def feeds(self) -> dict[str, Array]:
        """The next call's inputs, each `[rows, …]`."""

    @abstractmethod
    def take(self, outputs: Mapping[str, Array]) -> list[LatentChunk]:
        """Go on from the call's outputs, each `[rows, …]`; returns the chunks that this call finished."""


class BidirectionalSession(Session):
    """All latent frames at once, and so all chunks at once, after the last step."""

    def __init__(self, manifest: Manifest, request: DenoiseRequest) -> None:
        super().__init__(manifest, request)
        if request.scenes:
            raise ValueError(f"{request.video_id}: {manifest.name} is bidirectional, so its prompt can't change")
        self._text = np.stack(self._texts)
        self._noise = _Noise(self._seed)
        self._state = _start(self._table, self._noise.draw(self._latent_shape))

    @property
    def calls(self) -> int:
        return self._table.steps

    @property
    def graph(self) -> GraphName:
        return "denoiser" if self._table.timesteps[self.calls_done] >= self._boundary else "denoiser_2"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._latent_shape

    def feeds(self) -> dict[str, Array]:
        return {
            "latents": np.repeat(self._state[:1], self.rows, axis=0),
            "timestep": np.repeat(self._table.timesteps[self.calls_done], self.rows),
            "encoder_hidden_states": self._text,
        }

    def take(self, outputs: Mapping[str, Array]) -> list[LatentChunk]:
        self._state = _advance(self._table, self.calls_done, self._state, outputs["velocity"], self._noise)
        self.calls_done += 1
        if self.calls_done < self.calls:
            return []
        latents, size = self._state[0], self._chunk_frames
        starts = range(0, latents.shape[1], size)
        return [
            LatentChunk(i, np.ascontiguousarray(latents[:, start : start + size]), last=start == starts[-1])
            for i, start in enumerate(starts)
        ]


class CausalSession(Session):
    """Chunk after chunk: the sampler's steps, and then the clean-context pass that moves the cache on.

    A chunk is out before that pass, which the last one doesn't need. All that a chunk depends on is the cache and noise
    of its own, drawn from the seed and its index; so the start of a video doesn't depend on its length, and neither do
    a call's cost and the memory that is held.
    """

    _state: Floats

    def __init__(self, manifest: Manifest, request: DenoiseRequest, arrays: Arrays) -> None:
        super().__init__(manifest, request)
        assert manifest.causal is not None
        self._window = manifest.window
        scenes = sorted(request.scenes, key=lambda scene: scene[0])
        self._scenes = {chunk_from(manifest, start): text.hidden_states for start, text in scenes}
        _, _, height, width = self._latent_shape
        grid = height // self._patch, width // self._patch
        causal = manifest.causal
        # One allocation for the whole video; a chunk overwrites the one that has left the window.
        self._cache = arrays.zeros((self.rows, causal.layers, 2, self._window.cached_frames, *grid, causal.dim))
        self._begin_chunk(0)

    @property
    def calls(self) -> int:
        return self.chunks * (self._table.steps + 1) - 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        channels, frames, height, width = self._latent_shape
        return channels, min(self._chunk_frames, frames - self._chunk * self._chunk_frames), height, width

    def feeds(self) -> dict[str, Array]:
        denoising = self._step < self._table.steps
        timestep = self._table.timesteps[self._step] if denoising else np.float32(0)
        return {
            "latents": np.repeat(self._state[:1], self.rows, axis=0),
            "timestep": np.repeat(timestep, self.rows),
            "encoder_hidden_states": self._text,
            "cache": self._cache,
            "write_index": np.full(self.rows, self._chunk, np.int64),
        }

    def take(self, outputs: Mapping[str, Array]) -> list[LatentChunk]:
        self.calls_done += 1
        if self._step == self._table.steps:
            self._cache[:, :, :, self._window.frames_of(self._chunk)] = outputs["chunk_cache"]
            self._begin_chunk(self._chunk + 1)
            return []
        self._state = _advance(self._table, self._step, self._state, outputs["velocity"], self._noise)
        self._step += 1
        if self._step < self._table.steps:
            return []
        return [LatentChunk(self._chunk, self._state[0].copy(), last=self._chunk == self.chunks - 1)]

    def _begin_chunk(self, chunk: int) -> None:
        self._chunk, self._step = chunk, 0
        if chunk in self._scenes:
            self._texts[0] = self._scenes[chunk]
        self._text = np.stack(self._texts)
        self._noise = _Noise(self._seed, chunk)
        self._state = _start(self._table, self._noise.draw(self.shape))


class _Noise:
    """Gaussian noise by name: equal for equal seed, stream and draw, whatever else was drawn before."""

    def __init__(self, seed: int, *stream: int) -> None:
        self._seed, self._stream = seed, stream

    def draw(self, shape: tuple[int, ...], *name: int) -> Floats:
        sequence = np.random.SeedSequence(self._seed, spawn_key=(*self._stream, *name))
        return np.random.Generator(np.random.Philox(sequence)).standard_normal(shape, dtype=np.float32)


def _start(table: SamplerTable, noise: Floats) -> Floats:
    """A sampler's state float32 `[1 + history, …]`: the noise in front of an empty history."""
    state = np.zeros((1 + table.history, *noise.shape), np.float32)
    state[0] = noise
    return state


def _advance(table: SamplerTable, step: int, state: Floats, velocity: Array, noise: _Noise) -> Floats:
    """One sampler step from the velocities of one row, or when guided of two."""
    unconditional = velocity[1] if len(velocity) == 2 else None
    state = advance(table.coefficients[step], state, velocity[0], unconditional)
    if table.noise[step]:
        state[0] += table.noise[step] * noise.draw(state[0].shape, step + 1)
    return state

"""What a video needs between two engine calls: the inputs of its rows, and what becomes of their outputs.

One class for each rollout. The denoiser's loop knows only `Session`: it puts the rows of several sessions into one call
and hands each its part of the outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from models.bundle import GraphName, Manifest
from models.samplers import advance
from serving.engines.engine import HOST, Array, Arrays
from serving.pipeline.geometry import chunk_from, latent_shape
from serving.pipeline.shortcuts import full_steps, guided_steps, reused_steps
from serving.pipeline.sources import Held, Source, seen_picture
from serving.pipeline.stages import DenoiseRequest, LatentChunk, SamplerState

Floats = NDArray[np.float32]


def open_session(manifest: Manifest, request: DenoiseRequest, arrays: Arrays = HOST) -> Session:
    """`arrays` make what is kept between calls. Raises `ValueError` for what this model's rollout can't honour."""
    if manifest.rollout == "causal":
        return CausalSession(manifest, request, arrays)
    return BidirectionalSession(manifest, request)


class Session(ABC):
    """One video being denoised. A call holds `rows` rows of it: the prompt's, and when guided the negative's.

    One that was begun elsewhere goes on from there, to the same bits: `calls_done` doesn't begin at 0 then.
    """

    def __init__(self, manifest: Manifest, request: DenoiseRequest) -> None:
        spec, sampler = request.spec, manifest.sampler
        self._manifest = manifest
        self._seed = spec.seed
        self._patch = manifest.latent.patch
        self._chunk_frames = manifest.chunk_latent_frames
        self._latent_shape = latent_shape(manifest, spec)
        tokens = math.prod(self._latent_shape[1:]) // self._patch**2
        clean = manifest.rollout == "causal" or manifest.timesteps_by_frame
        self._seen = seen_picture(manifest, request, self._latent_shape)
        # A picture that is seen as channels is not put into the latents as well.
        self._source = Source(replace(request, source=None) if self._seen else request, self._latent_shape, clean=clean)
        skipped = skipped_steps(spec.num_inference_steps, self._source.strength)
        self._table = sampler.table(spec.num_inference_steps, spec.guidance_scale, tokens, spec.sampler, start=skipped)
        self._boundary = manifest.experts.boundary_timestep if manifest.experts else 0.0
        self._reused = reused_steps(self._table.sigmas.tolist(), spec.cache)
        guided = guided_steps(spec.num_inference_steps, spec.guidance_interval)[skipped:]
        self._guided = [spec.guidance_scale > 1 and step for step in guided]
        second = (self._table.timesteps < self._boundary).tolist()
        self._full = full_steps(self._guided, self._reused, second, spec.guidance_cache)
        self._difference: Floats | None = None
        self._lora_scales = _scales_of(manifest, request)
        self._texts = [request.conditional.hidden_states]
        if spec.guidance_scale > 1:
            if request.unconditional is None:
                raise ValueError(f"{request.video_id}: guidance needs an unconditional embedding")
            self._texts.append(request.unconditional.hidden_states)
        self.calls_done = 0

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows of it the next call holds."""

    @property
    def most_rows(self) -> int:
        """How many rows any of its calls holds."""
        return len(self._texts)

    @property
    def chunks(self) -> int:
        return len(self._manifest.chunks(self._latent_shape[1]))

    @property
    def tokens_per_row(self) -> int:
        """How many tokens each row of the next call computes."""
        _, frames, height, width = self.shape
        return frames * (height // self._patch) * (width // self._patch)

    @property
    @abstractmethod
    def calls(self) -> int:
        """How many engine calls the video takes from its beginning."""

    @property
    @abstractmethod
    def rows_left(self) -> int:
        """Rows of all calls that are still to come."""

    @property
    @abstractmethod
    def next_chunk(self) -> tuple[int, int]:
        """The chunk that comes out next, and how many calls from now."""

    @property
    def graph(self) -> GraphName:
        """Which denoiser the next call is for: a model may have another for little noise."""
        return "denoiser"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """`(channels, frames, height, width)` of a row's latents in the next call."""

    def settle(self, arrays: Arrays) -> None:  # noqa: B027 - most keep nothing for the engine
        """Before a call: the engine, and so what its state is made by, may be another one since the last call."""

    @abstractmethod
    def feeds(self) -> dict[str, Array]:
        """The next call's inputs, each `[rows, …]`."""

    def _rows_at(self, step: int) -> int:
        return 2 if self._full[step] else 1

    def _takes_difference(self, step: int) -> bool:
        """Whether the step is guided by what an earlier one found between its two rows."""
        return self._guided[step] and not self._full[step]

    def _rows_from(self, step: int) -> int:
        """Rows of the sampler's steps from this one on."""
        return sum(self._rows_at(later) for later in range(step, self._table.steps) if not self._reused[later])

    def _calls_before(self, step: int) -> int:
        """Engine calls that the sampler's steps before this one take."""
        return step - sum(self._reused[:step])

    def _advance(self, step: int, state: Floats, velocity: Array, noise: _Noise, held: Held) -> tuple[Floats, int]:
        """The state after a step of one or two rows, and after those that make do with its velocity; and the step that
        is next."""
        table = self._table
        # Without a row for it the unconditional velocity is the other one: guidance between equals is none.
        conditional, unconditional = velocity[0], velocity[-1]
        if self._takes_difference(step):
            assert self._difference is not None  # the first guided step is full
            unconditional = conditional - self._difference
        elif self._full[step]:
            self._difference = conditional - unconditional
        while True:
            state = advance(table.coefficients[step], state, conditional, unconditional)
            if table.noise[step]:
                state[0] += table.noise[step] * noise.draw(state[0].shape, step + 1)
            step += 1
            held.put(state, float(table.sigmas[step]))
            if step == table.steps or not self._reused[step]:
                return state, step

    def _loras(self) -> dict[str, Array]:
        """How much of each LoRA the rows get, if the next call's graph takes that."""
        if self._manifest.shape_of(self.graph, "lora_scales") is None:
            return {}
        return {"lora_scales": np.repeat(self._lora_scales, self.rows, axis=0)}

    @abstractmethod
    def take(self, outputs: Mapping[str, Array]) -> list[LatentChunk | SamplerState]:
        """Go on from the call's outputs, each `[rows, …]`; returns the chunks that this call finished, or a state that
        is worth keeping."""


class BidirectionalSession(Session):
    """All latent frames at once, and so all chunks at once, after the last step."""

    def __init__(self, manifest: Manifest, request: DenoiseRequest) -> None:
        super().__init__(manifest, request)
        if request.scenes:
            raise ValueError(f"{request.video_id}: {manifest.name} is bidirectional, so its prompt can't change")
        self._text = np.stack(self._texts)
        self._noise = _Noise(self._seed)
        channels, frames, height, width = self._latent_shape
        self._added = -frames % manifest.latent.patch_frames
        self._shape = (channels, self._added + frames, height, width)
        noise = self._noise.draw(self._shape)
        self._held = self._source.within(0, noise, clean=manifest.timesteps_by_frame)
        self._state = self._held.begin(self._table, noise)
        self._state_every = request.state_every
        self._step = 0
        if request.begun.state is not None:
            self._go_on_from(request)

    def _go_on_from(self, request: DenoiseRequest) -> None:
        begun, step = request.begun.state, request.begun.step
        asked = 0 < step < self._table.steps and not self._reused[step]
        held = len(self._state)
        expected = (held + self._takes_difference(step), *self._shape) if asked else None
        if begun is None or begun.shape != expected:
            raise ValueError(f"{request.video_id}: what was kept after step {step} is not of this video")
        self._state, self._step, self.calls_done = begun[:held], step, self._calls_before(step)
        self._difference = begun[held] if len(begun) > held else None

    @property
    def rows(self) -> int:
        return self._rows_at(self._step)

    @property
    def calls(self) -> int:
        return self._calls_before(self._table.steps)

    @property
    def rows_left(self) -> int:
        return self._rows_from(self._step)

    @property
    def next_chunk(self) -> tuple[int, int]:
        return 0, self.calls - self.calls_done

    @property
    def graph(self) -> GraphName:
        return "denoiser" if self._table.timesteps[self._step] >= self._boundary else "denoiser_2"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._shape

    def feeds(self) -> dict[str, Array]:
        return {
            "latents": np.repeat(self._state[:1], self.rows, axis=0),
            "timestep": self._timesteps(),
            "encoder_hidden_states": self._text[: self.rows],
            **{name: np.repeat(value[None], self.rows, axis=0) for name, value in self._seen.items()},
            **self._loras(),
        }

    def _kept(self) -> Floats:
        if self._takes_difference(self._step) and self._difference is not None:
            return np.concatenate([self._state, self._difference[None]])
        # Not a copy: a step makes a new array and leaves this one as it is.
        return self._state

    def _timesteps(self) -> Floats:
        """For each row, or for each of its frames: then those that are given are at 0, since they are clean."""
        timestep = self._table.timesteps[self._step]
        if not self._manifest.timesteps_by_frame:
            return np.repeat(timestep, self.rows)
        by_frame = np.full((self.rows, self._shape[1]), timestep)
        by_frame[:, : self._held.frames] = 0
        return by_frame

    def take(self, outputs: Mapping[str, Array]) -> list[LatentChunk | SamplerState]:
        before = self._step
        self._state, self._step = self._advance(self._step, self._state, outputs["velocity"], self._noise, self._held)
        self.calls_done += 1
        if self._step < self._table.steps:
            kept = self._state_every and self._step // self._state_every > before // self._state_every
            return [SamplerState(self._step, self._kept())] if kept else []
        latents = self._state[0][:, self._added :]
        parts = self._manifest.chunks(latents.shape[1])
        return [
            LatentChunk(i, np.ascontiguousarray(latents[:, part]), last=i == len(parts) - 1)
            for i, part in enumerate(parts)
        ]


class CausalSession(Session):
    """Chunk after chunk: the sampler's steps, and then the clean-context pass that moves the cache on.

    A chunk is out before that pass, which the last one doesn't need; one that is given takes that pass alone. All that
    a chunk depends on is the cache and noise of its own, drawn from the seed and its index; so the start of a video
    doesn't depend on its length, and neither do a call's cost and the memory that is held. A chunk that was finished
    elsewhere takes that pass alone too, from the first one on: in all but one layer a chunk's part of the cache depends
    on the chunks before it.
    """

    _state: Floats
    _step: int

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
        self._cache = arrays.zeros((len(self._texts), causal.layers, 2, self._window.cached_frames, *grid, causal.dim))
        self._finished = request.begun.chunks
        if len(self._finished) >= self.chunks:
            raise ValueError(f"{request.video_id}: all {self.chunks} chunks are finished")
        self.calls_done = max(0, len(self._finished) - self._given) * self._calls_before(self._table.steps)
        self._begin_chunk(0)

    @property
    def calls(self) -> int:
        return self._given + (self.chunks - self._given) * (self._calls_before(self._table.steps) + 1) - 1

    @property
    def rows_left(self) -> int:
        later = self.chunks - 1 - self._chunk
        made = later - max(0, max(self._given, len(self._finished)) - (self._chunk + 1))
        # As many passes that move the cache on as there are later chunks: this one's, and not the last one's.
        return self._rows_from(self._step) + made * self._rows_from(0) + later * len(self._texts)

    @property
    def rows(self) -> int:
        # The pass that moves the cache on is for the negative prompt's part of it too.
        return self._rows_at(self._step) if self._step < self._table.steps else len(self._texts)

    @property
    def next_chunk(self) -> tuple[int, int]:
        a_chunk = self._calls_before(self._table.steps)
        left = a_chunk - self._calls_before(self._step)
        # After the last step comes the pass that moves the cache on, and then another chunk.
        return (self._chunk, left) if left else (self._chunk + 1, 1 + a_chunk)

    @property
    def _given(self) -> int:
        """Chunks that are nothing but what the video begins from."""
        return self._source.frames // self._chunk_frames

    @property
    def shape(self) -> tuple[int, int, int, int]:
        channels, frames, height, width = self._latent_shape
        return channels, min(self._chunk_frames, frames - self._chunk * self._chunk_frames), height, width

    def settle(self, arrays: Arrays) -> None:
        self._cache = arrays.own(self._cache)

    def feeds(self) -> dict[str, Array]:
        denoising = self._step < self._table.steps
        timestep = self._table.timesteps[self._step] if denoising else np.float32(0)
        return {
            "latents": np.repeat(self._state[:1], self.rows, axis=0),
            "timestep": np.repeat(timestep, self.rows),
            "encoder_hidden_states": self._text[: self.rows],
            "cache": self._cache[: self.rows],
            "write_index": np.full(self.rows, self._chunk, np.int64),
            **self._loras(),
        }

    def take(self, outputs: Mapping[str, Array]) -> list[LatentChunk | SamplerState]:
        self.calls_done += 1
        if self._step == self._table.steps:
            self._cache[:, :, :, self._window.frames_of(self._chunk)] = outputs["chunk_cache"]
            given = [self._shown()] if self._held.whole and self._chunk >= len(self._finished) else []
            self._begin_chunk(self._chunk + 1)
            return [*given]
        self._state, self._step = self._advance(self._step, self._state, outputs["velocity"], self._noise, self._held)
        if self._step < self._table.steps:
            return []
        return [self._shown()]

    def _shown(self) -> LatentChunk:
        return LatentChunk(self._number(self._chunk), self._state[0].copy(), last=self._chunk == self.chunks - 1)

    def _number(self, chunk: int) -> int:
        """Of the video's chunks, which one is the session's `chunk`."""
        return chunk

    def _begin_chunk(self, chunk: int) -> None:
        self._chunk = chunk
        if chunk in self._scenes:
            self._texts[0] = self._scenes[chunk]
        self._text = np.stack(self._texts)
        self._noise = _Noise(self._seed, self._number(chunk))
        noise = self._noise.draw(self.shape)
        self._held = self._source.within(chunk * self._chunk_frames, noise)
        self._state = self._held.begin(self._table, noise)
        self._step = 0
        if chunk < len(self._finished):
            self._state[0] = self._finished[chunk]
            self._step = self._table.steps
        elif self._held.whole:
            self._held.put(self._state, 0.0)
            self._step = self._table.steps


class _Noise:
    """Gaussian noise by name: equal for equal seed, stream and draw, whatever else was drawn before."""

    def __init__(self, seed: int, *stream: int) -> None:
        self._seed, self._stream = seed, stream

    def draw(self, shape: tuple[int, ...], *name: int) -> Floats:
        sequence = np.random.SeedSequence(self._seed, spawn_key=(*self._stream, *name))
        return np.random.Generator(np.random.Philox(sequence)).standard_normal(shape, dtype=np.float32)


def _scales_of(manifest: Manifest, request: DenoiseRequest) -> Floats:
    """`[1, loras]`. Raises `ValueError` for one that the bundle hasn't: it was another one when that was asked for."""
    wanted, names = dict(request.spec.lora), [lora.name for lora in manifest.loras]
    if missing := wanted.keys() - set(names):
        raise ValueError(f"{request.video_id}: {manifest.name} has no LoRA {min(missing)!r}")
    return np.array([[wanted.get(name, 0.0) for name in names]], np.float32)


def skipped_steps(steps: int, strength: float) -> int:
    """How many of the sampler's steps a draft skips; diffusers' rule, but one step is always left."""
    return min(steps - int(min(steps * strength, steps)), steps - 1)

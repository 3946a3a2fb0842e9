"""The denoiser stage: many videos, each at its own step, through one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, Manifest
from models.samplers import SamplerTable, advance, build_table
from serving.engines.engine import Engine, EngineError
from serving.engines.onnx_runtime import CPU, OnnxRuntimeEngine
from serving.pipeline.geometry import latent_shape
from serving.pipeline.scheduler import Entry, Limits, StepScheduler
from serving.pipeline.stages import DenoiseRequest, LatentChunk, StepDone, VideoSpec

_Event = StepDone | LatentChunk | Exception


@dataclass(slots=True, eq=False)
class _Session:
    """One video being denoised. `state` float32 `[1 + history, channels, frames, height, width]`, the latent first."""

    table: SamplerTable
    hidden_states: NDArray[np.float32]
    state: NDArray[np.float32]
    events: asyncio.Queue[_Event]
    step: int = 0

    @property
    def rows(self) -> int:
        return len(self.hidden_states)


class EngineDenoiser:
    """A `Denoiser` over an engine: one loop makes one engine call after another, in a thread of its own.

    What the next call holds is decided between calls, so videos come and go at any step. At most `max_sessions` videos
    hold memory; others wait for a place. When a call fails, the videos that were in it raise, and the loop goes on.
    """

    def __init__(
        self, engine: Engine, manifest: Manifest, *, limits: Limits | None = None, max_sessions: int = 64
    ) -> None:
        if manifest.rollout != "bidirectional":
            raise ValueError(f"{manifest.name}: this denoiser runs bidirectional models, not {manifest.rollout} ones")
        self._engine = engine
        self._manifest = manifest
        self._scheduler = StepScheduler(limits or Limits())
        self._places = asyncio.Semaphore(max_sessions)
        self._sessions: dict[Hashable, _Session] = {}
        self._opened = 0
        self._work = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="denoiser")

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        threads: int = 1,
        provider: str = CPU,
        limits: Limits | None = None,
        max_sessions: int = 64,
    ) -> EngineDenoiser:
        engine = OnnxRuntimeEngine(bundle.path_of("denoiser"), threads=threads, provider=provider)
        return cls(engine, bundle.manifest, limits=limits, max_sessions=max_sessions)

    @property
    def sessions(self) -> int:
        """How many videos hold memory here."""
        return len(self._sessions)

    @property
    def outstanding_tokens(self) -> int:
        """Rows times tokens times steps that are still to run."""
        return self._scheduler.outstanding_tokens

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[StepDone | LatentChunk, None]:
        """Raises `EngineError` when a call that held this video failed, `ValueError` when no call could hold it."""
        async with self._places:
            id, session = self._open(request)
            try:
                while True:
                    event = await session.events.get()
                    if isinstance(event, Exception):
                        raise event
                    yield event
                    if isinstance(event, LatentChunk) and event.last:
                        return
            finally:
                self._scheduler.remove(id)
                self._sessions.pop(id, None)

    async def stop(self) -> None:
        """Stop the loop and wait for the call that is running. Videos that are still open raise `EngineError`."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        self._fail(list(self._sessions.values()), EngineError("the denoiser was stopped"))
        await asyncio.to_thread(self._thread.shutdown)

    def _open(self, request: DenoiseRequest) -> tuple[int, _Session]:
        spec, sampler = request.spec, self._manifest.sampler
        table = build_table(
            spec.sampler,
            spec.num_inference_steps,
            shift=sampler.shift,
            guidance_scale=spec.guidance_scale,
            num_train_timesteps=sampler.num_train_timesteps,
        )
        texts = [request.conditional]
        if spec.guidance_scale > 1:
            if request.unconditional is None:
                raise ValueError(f"{request.video_id}: guidance needs an unconditional embedding")
            texts.append(request.unconditional)
        shape = latent_shape(self._manifest, spec)
        _, frames, height, width = shape
        patch = self._manifest.latent.patch
        self._opened += 1
        self._scheduler.add(
            Entry(
                id=self._opened,
                shape=shape,
                rows=len(texts),
                tokens_per_row=frames * (height // patch) * (width // patch),
                steps=table.steps,
            )
        )
        # Everything a session can say fits, so the loop never waits for a slow reader.
        chunks = -(-frames // self._manifest.chunk_latent_frames)
        session = _Session(
            table=table,
            hidden_states=np.stack([t.hidden_states for t in texts]),
            state=_start(spec, shape, table.history),
            events=asyncio.Queue(table.steps + chunks + 1),
        )
        self._sessions[self._opened] = session
        if self._loop is None:
            self._loop = asyncio.create_task(self._run(), name="denoiser")
        self._work.set()
        return self._opened, session

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [self._sessions[id] for id in self._scheduler.next_step()]
            if not batch:
                self._work.clear()
                await self._work.wait()
                continue
            try:
                await loop.run_in_executor(self._thread, self._step, batch)
            except Exception as error:
                self._fail(batch, error)
                continue
            self._report(batch)

    def _report(self, batch: list[_Session]) -> None:
        for session in batch:
            session.events.put_nowait(StepDone(session.step, session.table.steps))
            if session.step == session.table.steps:
                for chunk in self._chunks(session):
                    session.events.put_nowait(chunk)

    def _fail(self, batch: list[_Session], error: Exception) -> None:
        for id in [id for id, session in self._sessions.items() if session in batch]:
            self._scheduler.remove(id)
            self._sessions.pop(id).events.put_nowait(error)

    def _step(self, batch: list[_Session]) -> None:
        """One engine call and one sampler step for each of `batch`, in the engine's thread."""
        velocity = self._engine.run(
            {
                "latents": np.concatenate([np.repeat(s.state[:1], s.rows, axis=0) for s in batch]),
                "timestep": np.concatenate([np.repeat(s.table.timesteps[s.step], s.rows) for s in batch]),
                "encoder_hidden_states": np.concatenate([s.hidden_states for s in batch]),
            }
        )["velocity"]
        row = 0
        for s in batch:
            unconditional = velocity[row + 1] if s.rows == 2 else None
            s.state = advance(s.table.coefficients[s.step], s.state, velocity[row], unconditional)
            s.step += 1
            row += s.rows

    def _chunks(self, session: _Session) -> list[LatentChunk]:
        latents, size = session.state[0], self._manifest.chunk_latent_frames
        starts = range(0, latents.shape[1], size)
        return [
            LatentChunk(i, np.ascontiguousarray(latents[:, start : start + size]), last=start == starts[-1])
            for i, start in enumerate(starts)
        ]


def _start(spec: VideoSpec, shape: tuple[int, int, int, int], history: int) -> NDArray[np.float32]:
    """The video's noise, from its seed alone, in front of an empty history."""
    state = np.zeros((1 + history, *shape), np.float32)
    np.random.Generator(np.random.Philox(spec.seed)).standard_normal(out=state[0], dtype=np.float32)
    return state

"""The denoiser stage: many videos, each at its own step, through one engine."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from models.bundle import Bundle, GraphName, Manifest
from serving.engines.engine import Engine, EngineError, arrays_of, engine_now
from serving.engines.onnx_runtime import CPU
from serving.engines.opening import Opener
from serving.metrics import BATCH_ROWS
from serving.pipeline.endless import EndlessSession
from serving.pipeline.geometry import first_frame
from serving.pipeline.pace import Pace, StageState
from serving.pipeline.scheduler import Due, Entry, Limits, StepScheduler, TraceLine
from serving.pipeline.sessions import Session, open_session
from serving.pipeline.stages import DenoiseEvent, DenoiseRequest, LatentChunk, SamplerState, Steering, StepDone
from serving.tracing import Carrier, record

_Event = DenoiseEvent | Exception


# So long before it is played a chunk is wanted: it is still to be decoded and sent, which may have to wait for others.
_AHEAD_SECONDS = 1.0
# So many times its share for a video that somebody may be watching: 2 to this power.
_INTERACTIVE_PRIORITY = 2


@dataclass(slots=True, eq=False)
class _Place:
    """A video that holds memory here, and where it hears what happened to it.

    One that is watched while it is made is played from `plays_at` on, when its first chunk is out.
    """

    video_id: str
    session: Session
    events: asyncio.Queue[_Event]
    priority: int
    watched: bool
    opened_at: float
    scheduled_calls: int
    """Up to which of the session's calls the scheduler knows of."""
    trace: Carrier
    running: bool = False
    plays_at: float | None = None


class EngineDenoiser:
    """A `Denoiser` over an engine: one loop makes one engine call after another, in a thread of its own.

    What the next call holds is decided between calls, so videos come and go at any step. At most `max_sessions` videos
    hold memory; others wait for a place. When a call fails, the videos that were in it raise, and the loop goes on.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        *,
        second: Engine | None = None,
        limits: Limits | None = None,
        max_sessions: int = 64,
    ) -> None:
        """`second` is the engine of `denoiser_2`, for a manifest with `experts`."""
        self._engines: dict[GraphName, Engine] = {"denoiser": engine}
        if second is not None:
            self._engines["denoiser_2"] = second
        self._manifest = manifest
        self._scheduler = StepScheduler(limits or Limits())
        self._free = asyncio.Semaphore(max_sessions)
        self._places: dict[Hashable, _Place] = {}
        self._opened = self._waiting = 0
        self._opened_tokens = 0
        self._pace = Pace()
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
        plans: Path | None = None,
        limits: Limits | None = None,
        max_sessions: int = 64,
    ) -> EngineDenoiser:
        names: list[GraphName] = ["denoiser", "denoiser_2"] if bundle.manifest.experts else ["denoiser"]
        engines = Opener(bundle, threads, provider, plans).start(*names)
        second = engines[1] if len(engines) > 1 else None
        return cls(engines[0], bundle.manifest, second=second, limits=limits, max_sessions=max_sessions)

    @property
    def sessions(self) -> int:
        """How many videos hold memory here."""
        return len(self._places)

    @property
    def outstanding_tokens(self) -> int:
        """Rows times tokens times steps that are still to run."""
        return self._scheduler.outstanding_tokens

    @property
    def state(self) -> StageState:
        """How it stands. A video that waits for a place counts as much as the others did on average."""
        waiting = self._waiting * self._opened_tokens / max(1, self._opened)
        seconds = self._pace.seconds(self.outstanding_tokens + waiting)
        # Nobody plays a video yet whose first chunk isn't out.
        now, played = time.monotonic(), [id for id, place in self._places.items() if place.plays_at is not None]
        slack = min((self._scheduler.slack_seconds(id, now) for id in played), default=math.inf)
        return StageState(self._waiting, len(self._places), seconds, self._pace.busy_seconds, _AHEAD_SECONDS + slack)

    @property
    def trace(self) -> Sequence[TraceLine]:
        """What ran in the last engine calls, and who left; a session is a video's id and a number."""
        return self._scheduler.trace

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseEvent, None]:
        """Raises `EngineError` when a call that held this video failed, `ValueError` when no call could hold it."""
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            id, events = self._open(request)
            try:
                while True:
                    event = await events.get()
                    if isinstance(event, Exception):
                        raise event
                    yield event
                    if isinstance(event, LatentChunk) and event.last:
                        return
            finally:
                self._scheduler.remove(id)
                self._places.pop(id, None)
        finally:
            self._free.release()

    async def steer(self, video_id: str, steering: Steering) -> bool:
        """From its next chunk on an endless video does as `steering` says; False when there is none of this name."""
        found = False
        for id, place in self._places.items():
            if place.video_id == video_id and isinstance(place.session, EndlessSession):
                found = True
                place.session.steer(steering)
                if not place.running:  # else it is looked at after the call
                    self._schedule(id, place)
        return found

    async def stop(self) -> None:
        """Stop the loop and wait for the call that is running. Videos that are still open raise `EngineError`."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        self._fail(list(self._places), EngineError("the denoiser was stopped"))
        await asyncio.to_thread(self._thread.shutdown)

    def _open(self, request: DenoiseRequest) -> tuple[Hashable, asyncio.Queue[_Event]]:
        opens = open_session if request.steering is None else EndlessSession
        session = opens(self._manifest, request, arrays_of(self._engines["denoiser"]))
        self._opened += 1
        self._opened_tokens += session.rows * session.tokens_per_row * (session.calls - session.calls_done)
        id = (request.video_id, self._opened)  # a video may be open twice for a moment, by an old attempt and a new one
        # Everything a session can say fits, so the loop never waits for a slow reader.
        events: asyncio.Queue[_Event] = asyncio.Queue(2 * session.calls + session.chunks + 1)
        place = _Place(
            request.video_id,
            session,
            events,
            priority=_INTERACTIVE_PRIORITY if request.interactive else 0,
            watched=request.interactive and self._manifest.rollout == "causal",
            opened_at=time.monotonic(),
            scheduled_calls=session.calls_done,
            trace=request.trace,
        )
        self._schedule(id, place)
        self._places[id] = place
        if self._loop is None:
            self._loop = asyncio.create_task(self._run(), name="denoiser")
        return id, events

    def _schedule(self, id: Hashable, place: _Place) -> None:
        """What the session may do now, once it has done what it was scheduled for: an endless one a chunk at a time."""
        session = place.session
        if session.calls_done != place.scheduled_calls or session.calls == session.calls_done:
            return
        if place.plays_at is not None:
            # It may have been paused: nobody can have waited for a chunk that is only now to be begun.
            begins = first_frame(self._manifest, session.next_chunk[0]) / self._manifest.fps
            place.plays_at = max(place.plays_at, time.monotonic() - begins)
        self._scheduler.add(
            Entry(
                id=id,
                shape=_group(session),
                rows=session.most_rows,
                tokens_per_row=session.tokens_per_row,
                steps=session.calls - session.calls_done,
                priority=place.priority,
            )
        )
        place.scheduled_calls = session.calls
        self._reshape(id, place)
        self._work.set()

    def _reshape(self, id: Hashable, place: _Place) -> None:
        """Tell the scheduler what the session's next call is like."""
        session = place.session
        shape, tokens = _group(session), session.tokens_per_row
        self._scheduler.reshape(id, shape, tokens, rows=session.rows, due=self._due(place))

    def _due(self, place: _Place) -> Due | None:
        """When the next chunk is wanted: the first as soon as may be, each other one a while before those that come
        before it are played."""
        if not place.watched:
            return None
        chunk, calls = place.session.next_chunk
        if place.plays_at is None:
            return Due(place.opened_at, calls)
        return Due(place.plays_at + first_frame(self._manifest, chunk) / self._manifest.fps - _AHEAD_SECONDS, calls)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            ids = self._scheduler.next_step(time.monotonic())
            if not ids:
                self._work.clear()
                await self._work.wait()
                continue
            batch = [self._places[id] for id in ids]
            sessions = [place.session for place in batch]
            for place in batch:
                place.running = True
            rows = sum(session.rows for session in sessions)
            shape, tokens = _group(sessions[0]), rows * sessions[0].tokens_per_row
            started = time.monotonic()
            try:
                chunks = await loop.run_in_executor(self._thread, self._step, sessions)
            except Exception as error:
                self._fail(ids, error)
                continue
            took = time.monotonic() - started
            self._scheduler.took(shape, rows, tokens, took)
            self._measure(batch, rows, tokens, took)
            for id, place, finished in zip(ids, batch, chunks, strict=True):
                self._report(id, place, finished)

    def _measure(self, batch: Sequence[_Place], rows: int, tokens: int, seconds: float) -> None:
        self._pace.took(tokens, seconds)
        BATCH_ROWS.observe(rows, **self._pace.labels)
        ended = time.time_ns()
        for place in batch:
            begun = ended - int(1e9 * seconds)
            record("step", place.trace, begun, ended, step=place.session.calls_done, batch_rows=rows, tokens=tokens)

    def _report(self, id: Hashable, place: _Place, finished: list[LatentChunk | SamplerState]) -> None:
        session, place.running = place.session, False
        place.events.put_nowait(StepDone(session.calls_done, session.calls))
        for event in finished:
            place.events.put_nowait(event)
            if place.plays_at is None and isinstance(event, LatentChunk):
                # A video that goes on elsewhere is in the middle, and is being played there.
                begins = first_frame(self._manifest, event.index) / self._manifest.fps
                place.plays_at = time.monotonic() - begins
        if session.calls_done < place.scheduled_calls:
            self._reshape(id, place)
        elif id in self._places:
            self._schedule(id, place)

    def _fail(self, ids: Sequence[Hashable], error: Exception) -> None:
        for id in ids:
            self._scheduler.remove(id)
            # Gone already, if its reader left during the call.
            if place := self._places.pop(id, None):
                place.events.put_nowait(error)

    def _step(self, batch: Sequence[Session]) -> list[list[LatentChunk | SamplerState]]:
        """One engine call for all of `batch`, in the engine's thread; returns what each session finished."""
        engine = engine_now(self._engines[batch[0].graph])
        arrays = arrays_of(engine)
        for session in batch:
            session.settle(arrays)
        fed = [session.feeds() for session in batch]
        outputs = engine.run({name: arrays.join([feeds[name] for feeds in fed]) for name in fed[0]})
        finished, row = [], 0
        for session in batch:
            rows = slice(row, row + session.rows)
            finished.append(session.take({name: output[rows] for name, output in outputs.items()}))
            row = rows.stop
        return finished


def _group(session: Session) -> tuple[Hashable, ...]:
    """What sessions must have in common to share a call: the engine, and the shape of their latents."""
    return session.graph, *session.shape

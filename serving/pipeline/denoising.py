"""The denoiser stage: many videos, each at its own step, through one engine."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

_log = logging.getLogger(__name__)

_Event = DenoiseEvent | Exception

# So long before it is played a chunk is wanted: it is still to be decoded and sent, which may have to wait for others.
_AHEAD_SECONDS = 1.0
# So long at most a lone viewer's first chunk is shown before the engine goes on with the next one.
_SHOWING_SECONDS = 0.3
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
    showing: bool = False
    """Its reader has the first chunk and hasn't come back for more."""
    plays_at: float | None = None


# What happened in a call, or instead of one, to each of its videos.
_News = Sequence[tuple[_Place, list[_Event]]]


class EngineDenoiser:
    """A `Denoiser` over an engine: a thread of its own makes one engine call after another.

    What the next call holds is decided between calls, so videos come and go at any step. At most `max_sessions` videos
    hold memory; others wait for a place. When a call fails, the videos that were in it raise, and the thread goes on.

    Between two calls the thread asks nobody: what it decides by is shared with the event loop under `_news`, a lock
    that is never held during a call, and what it did is told to the event loop while the next call runs.
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
        # Over the scheduler, the places, and whatever of a place or its session is not its running call's own.
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: str | None = None

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
        with self._news:
            return self._scheduler.outstanding_tokens

    @property
    def state(self) -> StageState:
        """How it stands. A video that waits for a place counts as much as the others did on average."""
        waiting = self._waiting * self._opened_tokens / max(1, self._opened)
        with self._news:
            seconds = self._pace.seconds(self._scheduler.outstanding_tokens + waiting)
            # Nobody plays a video yet whose first chunk isn't out.
            now, played = time.monotonic(), [id for id, place in self._places.items() if place.plays_at is not None]
            slack = min((self._scheduler.slack_seconds(id, now) for id in played), default=math.inf)
            in_flight = len(self._places)
        return StageState(self._waiting, in_flight, seconds, self._pace.busy_seconds, _AHEAD_SECONDS + slack)

    @property
    def trace(self) -> Sequence[TraceLine]:
        """What ran in the last engine calls, and who left; a session is a video's id and a number."""
        with self._news:
            return self._scheduler.trace

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseEvent, None]:
        """Raises `EngineError` when a call that held this video failed or the denoiser has ended, `ValueError` when no
        call could hold it.

        A reader in this process that is late to ask for what follows the first chunk of a watched video, since it
        decodes that chunk, has the cores to itself so long, if nobody else is here.
        """
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            id, place = self._open(request)
            try:
                while True:
                    event = await place.events.get()
                    if isinstance(event, Exception):
                        raise event
                    yield event
                    if isinstance(event, LatentChunk):
                        if event.last:
                            return
                        self._has_shown(place)
            finally:
                with self._news:
                    self._scheduler.remove(id)
                    self._places.pop(id, None)
                self._has_shown(place)
        finally:
            self._free.release()

    async def steer(self, video_id: str, steering: Steering) -> bool:
        """From its next chunk on an endless video does as `steering` says; False when there is none of this name."""
        found = False
        with self._news:
            for id, place in self._places.items():
                if place.video_id == video_id and isinstance(place.session, EndlessSession):
                    found = True
                    place.session.steer(steering)
                    if not place.running:  # else it is looked at after the call
                        self._schedule(id, place)
        return found

    async def stop(self) -> None:
        """Wait for the call that is running. Videos that are still open raise `EngineError`."""
        self._leave("the denoiser was stopped")
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            atexit.unregister(self._wait_at_exit)

    def _wait_at_exit(self) -> None:
        """A thread that comes back from an engine to an interpreter that is gone would abort the process."""
        self._leave("the process ends")
        if self._thread is not None:
            self._thread.join()

    def _leave(self, why: str) -> None:
        """Make no call any more."""
        with self._news:
            self._over = why
            self._fail(list(self._places), EngineError(why))
            self._news.notify()

    def _open(self, request: DenoiseRequest) -> tuple[Hashable, _Place]:
        opens = open_session if request.steering is None else EndlessSession
        session = opens(self._manifest, request, arrays_of(self._engines["denoiser"]))
        self._opened += 1
        self._opened_tokens += session.rows_left * session.tokens_per_row
        id = (request.video_id, self._opened)  # a video may be open twice for a moment, by an old attempt and a new one
        place = _Place(
            request.video_id,
            session,
            asyncio.Queue(),
            priority=_INTERACTIVE_PRIORITY if request.interactive else 0,
            watched=request.interactive and self._manifest.rollout == "causal",
            opened_at=time.monotonic(),
            scheduled_calls=session.calls_done,
            trace=request.trace,
        )
        with self._news:
            if self._over is not None:
                raise EngineError(self._over)
            self._schedule(id, place)
            self._places[id] = place
            self._news.notify()  # whoever was alone isn't any more
            if self._thread is None:
                self._loop = asyncio.get_running_loop()
                # A daemon: a process that ends without having stopped it waits for one call, not for all that is open.
                self._thread = threading.Thread(target=self._run, name="denoiser", daemon=True)
                self._thread.start()
                atexit.register(self._wait_at_exit)
        return id, place

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
                rows_left=session.rows_left,
                priority=place.priority,
            )
        )
        place.scheduled_calls = session.calls
        self._reshape(id, place)
        self._news.notify()

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

    def _run(self) -> None:
        """What the thread does."""
        try:
            while batch := self._next_batch():
                self._call(batch)
        except Exception as error:
            _log.exception("the denoiser's thread broke off")
            self._leave(f"the denoiser broke off: {error}")

    def _next_batch(self) -> dict[Hashable, _Place]:
        """Whose rows the next call holds, as soon as there is one to be made; none when all is over."""
        with self._news:
            self._show()
            while self._over is None:
                if ids := self._scheduler.next_step(time.monotonic()):
                    batch = {id: self._places[id] for id in ids}
                    for place in batch.values():
                        place.running = True
                    return batch
                self._news.wait()
        return {}

    def _show(self) -> None:
        """Let a lone viewer's first chunk be decoded without the next one beside it: that is what they wait for."""
        places = list(self._places.values())
        if len(places) == 1 and places[0].showing:
            lone = places[0]
            self._news.wait_for(lambda: not lone.showing or len(self._places) != 1, _SHOWING_SECONDS)
            lone.showing = False  # once, however long the reader stays away

    def _has_shown(self, place: _Place) -> None:
        with self._news:
            place.showing = False
            self._news.notify()

    def _call(self, batch: dict[Hashable, _Place]) -> None:
        sessions = [place.session for place in batch.values()]
        rows = sum(session.rows for session in sessions)
        shape, tokens = _group(sessions[0]), rows * sessions[0].tokens_per_row
        started = time.monotonic()
        try:
            outcomes = self._step(sessions)
        except Exception as error:
            with self._news:
                self._fail(list(batch), error)
            return
        took = time.monotonic() - started
        with self._news:
            self._scheduler.took(shape, rows, tokens, took)
            news = [
                (p, self._report(id, p, finished)) for (id, p), finished in zip(batch.items(), outcomes, strict=True)
            ]
        self._tell(news, rows, tokens, took)

    def _report(self, id: Hashable, place: _Place, finished: list[LatentChunk | SamplerState]) -> list[_Event]:
        """What its reader is to hear of the call."""
        session, place.running = place.session, False
        for event in finished:
            if place.plays_at is None and isinstance(event, LatentChunk):
                # A video that goes on elsewhere is in the middle, and is being played there.
                begins = first_frame(self._manifest, event.index) / self._manifest.fps
                place.plays_at = time.monotonic() - begins
                place.showing = place.watched and not event.last
        done = StepDone(session.calls_done, session.calls)
        if session.calls_done < place.scheduled_calls:
            self._reshape(id, place)
        elif id in self._places:
            self._schedule(id, place)
        return [done, *finished]

    def _fail(self, ids: Sequence[Hashable], error: Exception) -> None:
        for id in ids:
            self._scheduler.remove(id)
        # Gone already are those whose readers left during the call.
        gone = [place for id in ids if (place := self._places.pop(id, None)) is not None]
        if gone:
            self._tell([(place, [error]) for place in gone])

    def _tell(self, news: _News, *measured: Any) -> None:
        """Have the event loop hand it on, which it does while the next call runs."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._hand_on, news, *measured)
        except RuntimeError as error:
            # It was closed, and with it is gone whoever could have asked for more, or for less.
            self._over = f"the denoiser outlived its event loop: {error}"

    def _hand_on(self, news: _News, rows: int = 0, tokens: int = 0, seconds: float = 0.0) -> None:
        for place, events in news:
            for event in events:
                place.events.put_nowait(event)
        if rows:
            self._measure(news, rows, tokens, seconds)

    def _measure(self, news: _News, rows: int, tokens: int, seconds: float) -> None:
        self._pace.took(tokens, seconds)
        BATCH_ROWS.observe(rows, **self._pace.labels)
        ended = time.time_ns()
        for place, events in news:
            begun, done = ended - int(1e9 * seconds), events[0]
            step = done.step if isinstance(done, StepDone) else 0
            record("step", place.trace, begun, ended, step=step, batch_rows=rows, tokens=tokens)

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

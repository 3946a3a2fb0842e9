"""One request, from its sending to its end: what a client would have seen, and when."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from serving.bench.asks import Ask
from serving.bench.fragments import fragment_seconds
from serving.bench.viewer import Arrived
from serving.client.errors import ApiError, RushesError, VideoFailed, error_of
from serving.client.patience import headers
from serving.client.wire import FragmentReader

_ENDED = ("completed", "failed")


class Follow(StrEnum):
    """How a client learns of its video."""

    stream = "stream"  # the answer to the POST is the video, which only Rushes does
    watch = "watch"  # a job, and then `/stream`, which only Rushes has
    poll = "poll"  # a job that is asked about, on any server with the Videos API


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request. `scheduled` is when it should have been sent, and what its latency counts from: a
    generator that falls behind must not make a server look faster.

    `chunks` are those of a stream, by the same clock; without a stream there are none, and `video_seconds` is what the
    server says. `error` is the kind of what went wrong, None if nothing did.
    """

    ask: Ask
    scheduled: float
    sent: float
    ended: float
    accepted: float | None = None
    chunks: tuple[Arrived, ...] = ()
    video_id: str | None = None
    video_seconds: float | None = None
    error: str | None = None

    @property
    def latency_seconds(self) -> float:
        return self.ended - self.scheduled

    @property
    def first_chunk_seconds(self) -> float | None:
        return self.chunks[0].at_seconds - self.scheduled if self.chunks else None

    @property
    def between_chunks(self) -> list[float]:
        times = [chunk.at_seconds for chunk in self.chunks]
        return [after - before for before, after in itertools.pairwise(times)]


@dataclass(slots=True)
class _Seen:
    """What is known so far; it outlives whatever ends the request."""

    accepted: float | None = None
    chunks: list[Arrived] = field(default_factory=list)
    video_id: str | None = None
    video_seconds: float | None = None


class Target:
    """A server with the Videos API, and how requests to it are followed. `async with` it."""

    def __init__(
        self,
        url: str,
        follow: Follow = Follow.stream,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
        poll_seconds: float = 0.1,
        form: bool = False,
        delete: bool = False,
    ) -> None:
        """`form` sends multipart forms, as the openai SDK does, for servers that take nothing else; `delete` has every
        video deleted once it has ended, outside of what is measured."""
        self.follow = follow
        self._form = form
        self._timeout_seconds, self._poll_seconds, self._delete = timeout_seconds, poll_seconds, delete
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.http = httpx.AsyncClient(
            base_url=url,
            headers=headers(api_key),
            limits=unlimited,
            timeout=httpx.Timeout(timeout_seconds, connect=10.0),
        )
        self._start = time.perf_counter()

    def restart(self) -> None:
        """Times count from now on."""
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    async def make(self, ask: Ask, scheduled: float | None = None) -> Outcome:
        """Never raises for what a server does: that is an outcome too."""
        sent = self.now()
        seen, error = _Seen(), None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await (self._poll(ask, seen) if self.follow is Follow.poll else self._stream(ask, seen))
        except (RushesError, httpx.HTTPError, httpx.StreamError, OSError, ValueError, KeyError) as failure:
            error = kind_of(failure)
        ended = self.now()
        if self._delete and seen.video_id is not None:
            with suppress(httpx.HTTPError):
                await self.http.delete(f"/v1/videos/{seen.video_id}")
        return Outcome(
            ask=ask,
            scheduled=sent if scheduled is None else scheduled,
            sent=sent,
            ended=ended,
            accepted=seen.accepted,
            chunks=tuple(seen.chunks),
            video_id=seen.video_id,
            video_seconds=seen.video_seconds,
            error=error,
        )

    async def first_chunk_seconds(self, ask: Ask) -> float:
        """Of a Rushes service, which is then told to cancel the video. Raises what `make` makes an outcome of."""
        sent, seen = self.now(), _Seen()
        async with asyncio.timeout(self._timeout_seconds), aclosing(self._chunks(ask, seen)) as chunks:
            async for chunk in chunks:
                first = chunk.at_seconds - sent
                break
            else:
                raise RushesError("the answer is no stream of fragments")
        await self.http.post(f"/v1/videos/{seen.video_id}/cancel")
        return first

    async def __aenter__(self) -> Target:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def _poll(self, ask: Ask, seen: _Seen) -> None:
        video = await self._create(ask, seen)
        while video["status"] not in _ENDED:
            await asyncio.sleep(self._poll_seconds)
            video = _answer(await self.http.get(f"/v1/videos/{seen.video_id}"))
        if video["status"] == "failed":
            raise VideoFailed(str((video.get("error") or {}).get("code") or "failed"), "")
        with suppress(KeyError, TypeError, ValueError):
            seen.video_seconds = float(video["seconds"])

    async def _create(self, ask: Ask, seen: _Seen) -> Mapping[str, Any]:
        video = _answer(await self.http.post("/v1/videos", **self._sent(ask.body)))
        seen.accepted, seen.video_id = self.now(), str(video["id"])
        return video

    async def _stream(self, ask: Ask, seen: _Seen) -> None:
        async with aclosing(self._chunks(ask, seen)) as chunks:
            async for chunk in chunks:
                seen.chunks.append(chunk)
        if not seen.chunks:
            raise RushesError("the answer is no stream of fragments")
        seen.video_seconds = sum(chunk.seconds for chunk in seen.chunks)

    async def _chunks(self, ask: Ask, seen: _Seen) -> AsyncGenerator[Arrived, None]:
        if self.follow is Follow.watch:
            await self._create(ask, seen)
            request = self.http.build_request("GET", f"/v1/videos/{seen.video_id}/stream")
        else:
            request = self.http.build_request("POST", "/v1/videos", **self._sent({**ask.body, "stream": True}))
        response = await self.http.send(request, stream=True)
        try:
            if response.is_error:
                await response.aread()
                raise error_of(response)
            if seen.video_id is None:
                seen.accepted, seen.video_id = self.now(), response.headers.get("x-video-id")
            reader = FragmentReader()
            async for piece in response.aiter_raw():
                at = self.now()
                for chunk in reader.feed(piece):
                    yield Arrived(at, fragment_seconds(chunk.init, chunk.data))
        finally:
            await response.aclose()

    def _sent(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if not self._form:
            return {"json": dict(body)}
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
        # As files without names: httpx sends what isn't one as a form of another kind.
        return {"files": {name: (None, text) for name, text in texts.items()}}


def kind_of(failure: Exception) -> str:
    """A few words that many failures share, to count them by."""
    if isinstance(failure, ApiError):
        return f"http {failure.status}" + (f" {failure.code}" if failure.code else "")
    if isinstance(failure, VideoFailed):
        return f"video failed: {failure.code}"
    if isinstance(failure, TimeoutError | httpx.TimeoutException):
        return "timeout"
    if isinstance(failure, httpx.ConnectError):
        return "no connection"
    if isinstance(failure, httpx.HTTPError | httpx.StreamError | OSError):
        return "connection lost"
    return "not as the Videos API answers"


def _answer(response: httpx.Response) -> Mapping[str, Any]:
    """Raises `ApiError`, or `ValueError` for what is no JSON object."""
    if response.is_error:
        raise error_of(response)
    answer = response.json()
    if not isinstance(answer, dict) or not isinstance(answer.get("status"), str):
        raise ValueError(f"not a video: {json.dumps(answer)[:100]}")
    return answer

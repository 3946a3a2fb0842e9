"""Interactive sessions, for asyncio and without it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
from anyio.from_thread import BlockingPortal
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from serving.client.errors import ApiError, RushesError, Unreachable
from serving.client.wire import Chunk

_LARGEST_MESSAGE_BYTES = 1 << 28
# What an error event doesn't say: the status that the answer to a request would have had.
_STATUSES = {"rate_limit_exceeded": 429, "too_many_sessions": 429, "missing_api_key": 401, "invalid_api_key": 401}


@dataclass(frozen=True, slots=True)
class LiveChunk(Chunk):
    """A chunk of a session: `about` says all that the service does of it, its `prompt` among it."""

    about: dict[str, Any] = field(repr=False)

    @property
    def prompt(self) -> str:
        """What it was denoised under."""
        return str(self.about["prompt"])

    @property
    def prompt_changed(self) -> bool:
        """Whether it is the first one under its prompt."""
        return bool(self.about["prompt_changed"])


class AsyncRealtime:
    """A session: iterate over it for its chunks, and steer it meanwhile. It ends with its `async with` block.

    A chunk is acknowledged when the next one is asked for, and the service is never more than `buffer_seconds` ahead of
    that; so whoever doesn't read stops the making. A session doesn't outlive its connection.
    """

    def __init__(self, url: httpx.URL, headers: dict[str, str], settings: dict[str, Any]) -> None:
        """Use `AsyncRushes.realtime`."""
        self._url, self._headers, self._settings = url, headers, settings
        self._socket: ClientConnection | None = None
        self._init = b""
        self._given = -1
        self.session: dict[str, Any] = {}
        """What the service says of it: `id`, `size`, `fps`, `seed` and so on."""
        self.end_reason: str | None = None
        """Once it has ended: `stopped`, `idle`, `too_long`, `model_replaced` or `model_unloaded` with its model, or
        `closed` when the connection was cut."""

    async def __aenter__(self) -> Self:
        """Raises `ApiError` for what the service refuses, `Unreachable` when it isn't there."""
        scheme = "wss" if self._url.scheme == "https" else "ws"
        url = str(self._url.copy_with(scheme=scheme))
        try:
            self._socket = await connect(
                url,
                additional_headers=self._headers,
                max_size=_LARGEST_MESSAGE_BYTES,
                # The service sends no more than what its buffer may be ahead of what was acknowledged. And a queue that
                # is full isn't read any more: whoever leaves then would wait 10 s for the answer to their goodbye.
                max_queue=None,
                proxy=None,
            )
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise Unreachable(f"no session could be opened: {error}") from error
        try:
            await self._say("session.create", session=self._settings)
            event = await self._next_event("session.created")
            if event["type"] != "session.created":
                raise Unreachable("the service closed the connection")
            self.session = event["session"]
        except BaseException:
            await self._socket.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._socket is not None:
            await self._socket.close()

    async def change_prompt(self, prompt: str) -> None:
        """From the next chunk that is denoised on; that chunk is `prompt_changed`."""
        await self._say("session.update", session={"prompt": prompt})

    async def pause(self) -> None:
        """No further chunk is begun; what is made already still comes."""
        await self._say("session.pause")

    async def resume(self) -> None:
        await self._say("session.resume")

    async def stop(self) -> None:
        """The iteration ends soon."""
        await self._say("session.stop")

    async def __aiter__(self) -> AsyncGenerator[LiveChunk, None]:
        """Until the session ends. Raises `ApiError` for what the service doesn't accept, such as an empty prompt: the
        session goes on, and so may the iteration."""
        while True:
            if self._given >= 0:
                await self._say("fragment.ack", index=self._given)
            event = await self._next_event("fragment", "init", "session.ended")
            if event["type"] == "session.ended":
                self.end_reason = event["reason"]
                return
            try:
                data = await self._binary()
            except ConnectionClosed:
                self.end_reason = "closed"
                return
            if event["type"] == "init":
                self._init = data
                continue
            self._given = event["index"]
            yield LiveChunk(event["index"], self._init, data, event)

    async def _binary(self) -> bytes:
        assert self._socket is not None
        message = await self._socket.recv()
        if isinstance(message, str):
            raise RushesError("the bytes that were announced didn't come")
        return message

    async def _say(self, kind: str, **fields: Any) -> None:
        assert self._socket is not None
        with suppress(ConnectionClosed):  # whoever reads hears of it
            await self._socket.send(json.dumps({"type": kind, **fields}))

    async def _next_event(self, *kinds: str) -> dict[str, Any]:
        """The next one of these kinds; others are passed over. Raises `ApiError` for an error."""
        assert self._socket is not None
        while True:
            try:
                message = await self._socket.recv()
            except ConnectionClosed:
                return {"type": "session.ended", "reason": "closed"}
            if isinstance(message, bytes):
                raise RushesError("bytes came that nothing announced")
            event: dict[str, Any] = json.loads(message)
            if event["type"] == "error":
                error = event["error"]
                raise ApiError(
                    _STATUSES.get(error["code"], 500 if error["type"] == "server_error" else 400),
                    error["message"],
                    param=error["param"],
                    code=error["code"],
                    retry_after_seconds=None,
                )
            if event["type"] in kinds:
                return event


class Realtime:
    """As `AsyncRealtime`, for programs without asyncio. Other threads than the one that reads may steer it."""

    def __init__(self, portal: BlockingPortal, session: AsyncRealtime) -> None:
        """Use `Rushes.realtime`."""
        self._portal, self._session = portal, session

    @property
    def session(self) -> dict[str, Any]:
        return self._session.session

    @property
    def end_reason(self) -> str | None:
        return self._session.end_reason

    def __enter__(self) -> Self:
        self._portal.call(self._session.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._portal.call(self._session.__aexit__, kind, error, traceback)

    def change_prompt(self, prompt: str) -> None:
        self._portal.call(self._session.change_prompt, prompt)

    def pause(self) -> None:
        self._portal.call(self._session.pause)

    def resume(self) -> None:
        self._portal.call(self._session.resume)

    def stop(self) -> None:
        self._portal.call(self._session.stop)

    def __iter__(self) -> Iterator[LiveChunk]:
        chunks = self._session.__aiter__()
        try:
            while True:
                try:
                    yield self._portal.call(chunks.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            self._portal.call(chunks.aclose)

"""A fused replica's own way in: an HTTP server in its event loop, with no process between it and its clients.

What Ray's proxy does for them is done here too: a limit to the requests in hand, and an `X-Request-ID` on each answer.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from uuid import uuid4

import uvicorn
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import error_body

# What requests in hand have when their replica must go. More would be in vain: it has failed its health check.
CLOSE_SECONDS = 2
# As Ray's proxy; uvicorn's own 5 s are when many clients would just use their connection again.
_KEEP_ALIVE_SECONDS = 90
_BACKLOG = 2048
# A replica that was killed may take a while to be gone, with gigabytes to be given back.
_BIND_SECONDS = 60.0
_LOOK_SECONDS = 0.05


class Door:
    """Clients can connect from the moment that it is there, and are answered while it is `serving`."""

    def __init__(self, listening: socket.socket, max_ongoing_requests: int) -> None:
        self._listening, self._most = listening, max_ongoing_requests

    @classmethod
    async def at(cls, host: str, port: int, max_ongoing_requests: int) -> Door:
        """Waits for the replica before this one to be gone. Raises `OSError`."""
        give_up_at = time.monotonic() + _BIND_SECONDS
        while True:
            listening = socket_of(host)
            try:
                listening.bind((host, port))
                listening.listen(_BACKLOG)
                return cls(listening, max_ongoing_requests)
            except OSError as error:
                listening.close()
                if error.errno != errno.EADDRINUSE or time.monotonic() > give_up_at:
                    raise OSError(error.errno, f"{host}:{port} can't be listened on: {error.strerror}") from None
            await asyncio.sleep(_LOOK_SECONDS)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self._listening.getsockname()[:2]
        return str(host), int(port)

    @asynccontextmanager
    async def serving(self, app: ASGIApp) -> AsyncIterator[None]:
        """The lifespan of `app`, which no server runs again.

        At its end new connections are refused at once, and `CLOSE_SECONDS` later no client is waited for any more.
        """
        config = uvicorn.Config(
            Reception(app, self._most),
            lifespan="off",
            ws="websockets-sansio",  # until some version `auto` was one that websockets has deprecated
            ws_per_message_deflate=False,  # video can't be made smaller
            log_config=None,
            log_level="warning",
            access_log=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        server = _Server(config)
        running = asyncio.create_task(server.serve(sockets=[self._listening]))
        try:
            yield
        finally:
            server.should_exit = True
            await running


class Reception:
    """ASGI middleware: `max_ongoing_requests` requests and sessions at a time; one too many is answered 503.

    Connections over which nothing is asked for at the moment don't count.
    """

    def __init__(self, app: ASGIApp, max_ongoing_requests: int) -> None:
        self._app, self._most = app, max_ongoing_requests
        self._ongoing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Headers(scope=scope).get("x-request-id") or str(uuid4())

        async def send_named(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        if self._ongoing >= self._most:
            await _too_many(self._ongoing)(scope, receive, send_named)
            return
        self._ongoing += 1
        try:
            await self._app(scope, receive, send_named)
        finally:
            self._ongoing -= 1


def socket_of(host: str) -> socket.socket:
    """One that can listen there as soon as nobody else does."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made


def _too_many(ongoing: int) -> JSONResponse:
    """To a handshake as well: Starlette says it in the words of either protocol."""
    message = f"The service has {ongoing} requests in hand, which is as many as it takes; ask again in a moment."
    status = HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse(error_body(status, message, None, "overloaded"), status, {"Retry-After": "1"})


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Those of the process are Ray's."""
        yield

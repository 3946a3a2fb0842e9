"""The fused replica's HTTP server: whom it lets in, and that nobody keeps it from closing."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from service import until
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from serving.deployments.door import Door, Reception

# What hangs here would hang for good.
pytestmark = pytest.mark.timeout(20)
MOST = 3


@dataclass
class House:
    """An application with a door, and what has happened in it."""

    begun: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    url: str = ""
    address: tuple[str, int] = ("127.0.0.1", 0)

    async def request(self, line: str, *headers: str) -> socket.socket:
        """A client that asks and doesn't read."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, self.address)
        await loop.sock_sendall(client, "\r\n".join([f"{line} HTTP/1.1", "Host: x", *headers, "", ""]).encode())
        return client


@asynccontextmanager
async def open_house(*, most: int = MOST) -> AsyncIterator[House]:
    house = House()
    door = await Door.at("127.0.0.1", 0, most)
    house.address = door.address
    house.url = f"http://127.0.0.1:{door.address[1]}"
    app = FastAPI(lifespan=door.serving)

    @app.get("/short")
    async def short() -> str:
        return "done"

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            house.begun.append("stream")
            try:
                while True:
                    yield bytes(1 << 20)
                    await asyncio.sleep(0)
            finally:
                house.ended.append("stream")

        return StreamingResponse(parts())

    @app.websocket("/session")
    async def session(socket: WebSocket) -> None:
        await socket.accept()
        house.begun.append("session")
        try:
            while True:
                await socket.receive_text()
        finally:
            house.ended.append("session")

    async with app.router.lifespan_context(app):
        yield house


WEBSOCKET = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    f"Sec-WebSocket-Key: {22 * 'A'}==",
)


async def test_it_closes_whoever_stays() -> None:
    """A stream that nobody reads, a connection without a request, half a request, a session, half a handshake."""
    async with AsyncExitStack() as clients:
        async with open_house(most=10) as house:
            for line, *headers in (
                ("GET /endless",),
                ("GET /session", *WEBSOCKET),
                ("GET /short", "Content-Length: 5"),
                ("GET /short",),
            ):
                clients.enter_context(await house.request(line, *headers))
            idle = await clients.enter_async_context(httpx.AsyncClient(base_url=house.url))
            assert (await idle.get("/short")).json() == "done"
            await until(lambda: sorted(house.begun) == ["session", "stream"])
        assert "session" in house.ended
        with pytest.raises(httpx.ConnectError):
            await idle.get("/short")


async def test_one_request_too_many_is_refused_and_idle_connections_do_not_count() -> None:
    async with open_house() as house, httpx.AsyncClient(base_url=house.url) as idle:
        for _ in range(2 * MOST):
            other = httpx.AsyncClient(base_url=house.url)
            await idle.get("/short")
            await other.get("/short")
        streams = [await house.request("GET /endless") for _ in range(MOST - 1)]
        async with connect(house.url.replace("http", "ws") + "/session"):
            await until(lambda: len(house.begun) == MOST)
            refused = await idle.get("/short")
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert refused.json()["error"]["type"] == "server_error"
            assert refused.json()["error"]["code"] == "overloaded"
            with pytest.raises(InvalidStatus) as handshake:
                await connect(house.url.replace("http", "ws") + "/session")
            assert handshake.value.response.status_code == 503
            assert b"overloaded" in handshake.value.response.body
        await until(lambda: "session" in house.ended)
        assert (await idle.get("/short")).status_code == 200
        for stream in streams:
            stream.close()
        await until(lambda: len(house.ended) == MOST)


async def test_each_answer_has_the_id_of_its_request() -> None:
    async with open_house() as house, httpx.AsyncClient(base_url=house.url) as client:
        named = await client.get("/short", headers={"X-Request-ID": "mine"})
        assert named.headers.get_list("X-Request-ID") == ["mine"]
        given = {(await client.get("/short")).headers["X-Request-ID"] for _ in range(2)}
        assert len(given) == 2


async def test_a_place_is_free_again_after_an_error() -> None:
    async def fails(*_: object) -> None:
        raise ValueError

    reception = Reception(fails, max_ongoing_requests=1)
    for _ in range(2):
        with pytest.raises(ValueError):  # noqa: PT011 - it is the one above
            await reception({"type": "http", "headers": []}, fails, fails)


async def test_the_next_one_waits_for_the_port() -> None:
    async with open_house() as house:
        following = asyncio.create_task(Door.at(*house.address, MOST))
        async with httpx.AsyncClient(base_url=house.url) as client:
            assert (await client.get("/short")).json() == "done"
        assert not following.done()
    door = await following
    assert door.address == house.address
    async with door.serving(Reception(FastAPI(), MOST)), httpx.AsyncClient(base_url=house.url) as client:
        assert (await client.get("/short")).status_code == 404


async def test_an_address_that_can_not_be_had_is_said_at_once() -> None:
    with pytest.raises(OSError, match=r"192\.0\.2\.1:8000 can't be listened on: "):
        await Door.at("192.0.2.1", 8000, MOST)


async def test_signals_are_left_to_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with open_house() as house, httpx.AsyncClient(base_url=house.url) as client:
        await client.get("/short")
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

"""The client for asyncio."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from uuid import uuid4

import httpx
import numpy as np
from numpy.typing import NDArray

from serving.client.errors import ApiError, Unreachable, error_of
from serving.client.patience import (
    BATCH_ENDED,
    DEFAULT_URL,
    ENDED,
    QUIET,
    RETRY_SECONDS,
    Patience,
    batch_file,
    checked,
    headers,
    without_none,
)
from serving.client.realtime import AsyncRealtime
from serving.client.wire import Chunk, Event, EventReader, FragmentReader

Video = dict[str, Any]
Variant = Literal["video", "thumbnail", "spritesheet"]


class AsyncRushes:
    """One service. Every method raises `ApiError` for what the service refuses and `Unreachable` when it is away."""

    def __init__(
        self, base_url: str = DEFAULT_URL, api_key: str | None = None, *, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        """`api_key` None means the environment's RUSHES_API_KEY. A service that is away is tried for so long."""
        self._retry_seconds = retry_seconds
        self._http = httpx.AsyncClient(base_url=base_url, headers=headers(api_key), timeout=QUIET)

    async def create(self, prompt: str, *, idempotency_key: str | None = None, **settings: Any) -> Video:
        """Ask for a video; `settings` are the request's other fields. Asking again after a lost answer counts once."""
        key = idempotency_key or uuid4().hex
        body = {"prompt": prompt, **without_none(settings)}
        return await self._json("POST", "/v1/videos", json=body, headers={"Idempotency-Key": key})

    async def get(self, video_id: str) -> Video:
        return await self._json("GET", f"/v1/videos/{video_id}")

    async def list(
        self, *, order: Literal["asc", "desc"] = "desc", limit: int | None = None
    ) -> AsyncGenerator[Video, None]:
        """All videos, or the first `limit`, page after page."""
        after, left = None, limit
        while left is None or left > 0:
            params = without_none({"order": order, "after": after, "limit": min(left or 100, 100)})
            page = await self._json("GET", "/v1/videos", params=params)
            for video in page["data"]:
                yield video
            if not page["has_more"]:
                return
            after = page["last_id"]
            left = None if left is None else left - len(page["data"])

    async def cancel(self, video_id: str) -> Video:
        return await self._json("POST", f"/v1/videos/{video_id}/cancel")

    async def delete(self, video_id: str) -> None:
        await self._json("DELETE", f"/v1/videos/{video_id}")

    async def watch(self, video_id: str, *, from_fragment: int = 0) -> AsyncGenerator[Chunk, None]:
        """Each chunk as soon as it is there, once and in order, over as many connections as it takes.

        Ends when the video is completed. Raises `VideoFailed` when it fails instead.
        """
        reader, patience = FragmentReader(from_fragment), Patience(self._retry_seconds)
        while True:
            try:
                params = {"from_fragment": reader.next_index}
                async with self._http.stream("GET", f"/v1/videos/{video_id}/stream", params=params) as response:
                    await self._check(response)
                    reader.reconnected()
                    async for piece in response.aiter_raw():
                        for chunk in reader.feed(piece):
                            patience.renew()
                            yield chunk
                # A stream may end for a service that goes away as for a video that is whole: the store knows.
                if checked(await self.get(video_id))["status"] in ENDED:
                    return
                await asyncio.sleep(0.1)
            except httpx.ReadTimeout:
                continue
            except (httpx.TransportError, httpx.StreamError, ApiError) as error:
                await asyncio.sleep(patience.pause(error))

    async def frames(self, video_id: str) -> AsyncGenerator[NDArray[np.uint8], None]:
        """Every frame, RGB `[height, width, 3]`, as `watch` brings them."""
        async for chunk in self.watch(video_id):
            for frame in chunk.frames():
                yield frame

    async def events(self, video_id: str) -> AsyncGenerator[Event, None]:
        """What happens to a video, until `completed` or `failed`, over as many connections as it takes."""
        reader, patience = EventReader(), Patience(self._retry_seconds)
        while True:
            try:
                asked = without_none({"Last-Event-ID": reader.last_id})
                async with self._http.stream("GET", f"/v1/videos/{video_id}/events", headers=asked) as response:
                    await self._check(response)
                    reader.reconnected()
                    async for line in response.aiter_lines():
                        event = reader.feed(line)
                        if event is not None:
                            patience.renew()
                            yield event
                            if event.name in ENDED:
                                return
                await asyncio.sleep(0.1)
            except httpx.ReadTimeout:
                continue
            except (httpx.TransportError, httpx.StreamError, ApiError) as error:
                await asyncio.sleep(patience.pause(error))

    def realtime(self, prompt: str, **settings: Any) -> AsyncRealtime:
        """An endless video on a causal model, steered while it is made; `settings` are its `model`, `size` and so on.

        `async with` it.
        """
        url = self._http.base_url.join("v1/realtime")
        key = {name: value for name, value in self._http.headers.items() if name == "authorization"}
        return AsyncRealtime(url, key, {"prompt": prompt, **without_none(settings)})

    async def wait(self, video_id: str, on_progress: Callable[[int], None] | None = None) -> Video:
        """Until it is completed; `on_progress` hears of every per cent. Raises `VideoFailed`."""
        async for event in self.events(video_id):
            if event.name == "progress" and on_progress is not None:
                on_progress(event.data["progress"])
        return checked(await self.get(video_id))

    async def save(self, video_id: str, path: Path, variant: Variant = "video") -> None:
        """Write a completed video, or a picture of it, to `path`: whole or not at all."""
        await self._save(f"/v1/videos/{video_id}/content", path, variant=variant)

    async def save_file(self, file_id: str, path: Path) -> None:
        """The same of a file, such as a batch's `output_file_id`."""
        await self._save(f"/v1/files/{file_id}/content", path)

    async def _save(self, source: str, path: Path, **params: str) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            async with self._http.stream("GET", source, params=params) as response:
                await self._check(response)
                with partial.open("wb") as file:
                    async for piece in response.aiter_bytes():
                        file.write(piece)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    async def create_batch(
        self, requests: Iterable[Mapping[str, Any]] | Path, *, completion_window: str = "24h"
    ) -> dict[str, Any]:
        """A batch of request bodies, or of a JSONL file. Its state: `id`, `status`, `request_counts` and so on."""
        name, content = batch_file(requests)
        file = await self._json(
            "POST", "/v1/files", files={"file": (name, content)}, data={"purpose": "batch"}, again=False
        )
        asked = {"input_file_id": file["id"], "endpoint": "/v1/videos", "completion_window": completion_window}
        return await self._json("POST", "/v1/batches", json=asked, again=False)

    async def get_batch(self, batch_id: str) -> dict[str, Any]:
        return await self._json("GET", f"/v1/batches/{batch_id}")

    async def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        return await self._json("POST", f"/v1/batches/{batch_id}/cancel")

    async def wait_batch(self, batch_id: str, *, poll_seconds: float = 1.0) -> dict[str, Any]:
        """Until it has ended, in whichever way."""
        while True:
            batch = await self.get_batch(batch_id)
            if batch["status"] in BATCH_ENDED:
                return batch
            await asyncio.sleep(poll_seconds)

    async def batch_results(self, batch: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The lines of an ended batch's output and error files."""
        for name in ("output_file_id", "error_file_id"):
            if batch[name] is None:
                continue
            async with self._http.stream("GET", f"/v1/files/{batch[name]}/content") as response:
                await self._check(response)
                async for line in response.aiter_lines():
                    yield json.loads(line)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _json(self, method: str, path: str, *, again: bool = True, **options: Any) -> dict[str, Any]:
        """`again` says that a request whose answer was lost may be sent another time."""
        patience = Patience(self._retry_seconds)
        while True:
            try:
                response = await self._http.request(method, path, **options)
                await self._check(response)
                answer: dict[str, Any] = response.json()
                return answer
            except (httpx.TransportError, ApiError) as error:
                if not again and isinstance(error, ApiError):
                    raise
                if not again and not isinstance(error, httpx.ConnectError):
                    raise Unreachable(f"the answer was lost: {error}") from error
                await asyncio.sleep(patience.pause(error))

    async def _check(self, response: httpx.Response) -> None:
        """Raises `ApiError`."""
        if response.is_error:
            await response.aread()
            raise error_of(response)

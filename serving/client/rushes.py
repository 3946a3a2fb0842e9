"""The client for programs without asyncio: the other one, run in a thread of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np
from anyio.from_thread import start_blocking_portal
from numpy.typing import NDArray

from serving.client.patience import DEFAULT_URL, RETRY_SECONDS
from serving.client.realtime import Realtime
from serving.client.rushes_async import AsyncRushes, Variant, Video
from serving.client.wire import Chunk, Event

_T = TypeVar("_T")


class Rushes:
    """As `AsyncRushes`, whose methods say what each does."""

    def __init__(
        self, base_url: str = DEFAULT_URL, api_key: str | None = None, *, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self._client = AsyncRushes(base_url, api_key, retry_seconds=retry_seconds)
        self._running = ExitStack()
        self._portal = self._running.enter_context(start_blocking_portal())

    def create(self, prompt: str, *, idempotency_key: str | None = None, **settings: Any) -> Video:
        return self._portal.call(lambda: self._client.create(prompt, idempotency_key=idempotency_key, **settings))

    def get(self, video_id: str) -> Video:
        return self._portal.call(self._client.get, video_id)

    def list(self, *, order: Literal["asc", "desc"] = "desc", limit: int | None = None) -> Iterator[Video]:
        return self._each(self._client.list(order=order, limit=limit))

    def cancel(self, video_id: str) -> Video:
        return self._portal.call(self._client.cancel, video_id)

    def delete(self, video_id: str) -> None:
        self._portal.call(self._client.delete, video_id)

    def watch(self, video_id: str, *, from_fragment: int = 0) -> Iterator[Chunk]:
        return self._each(self._client.watch(video_id, from_fragment=from_fragment))

    def frames(self, video_id: str) -> Iterator[NDArray[np.uint8]]:
        return self._each(self._client.frames(video_id))

    def events(self, video_id: str) -> Iterator[Event]:
        return self._each(self._client.events(video_id))

    def realtime(self, prompt: str, **settings: Any) -> Realtime:
        return Realtime(self._portal, self._client.realtime(prompt, **settings))

    def wait(self, video_id: str, on_progress: Callable[[int], None] | None = None) -> Video:
        return self._portal.call(self._client.wait, video_id, on_progress)

    def save(self, video_id: str, path: Path, variant: Variant = "video") -> None:
        self._portal.call(self._client.save, video_id, path, variant)

    def save_file(self, file_id: str, path: Path) -> None:
        self._portal.call(self._client.save_file, file_id, path)

    def create_batch(
        self, requests: Iterable[Mapping[str, Any]] | Path, *, completion_window: str = "24h"
    ) -> dict[str, Any]:
        return self._portal.call(lambda: self._client.create_batch(requests, completion_window=completion_window))

    def get_batch(self, batch_id: str) -> dict[str, Any]:
        return self._portal.call(self._client.get_batch, batch_id)

    def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        return self._portal.call(self._client.cancel_batch, batch_id)

    def wait_batch(self, batch_id: str, *, poll_seconds: float = 1.0) -> dict[str, Any]:
        return self._portal.call(lambda: self._client.wait_batch(batch_id, poll_seconds=poll_seconds))

    def batch_results(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        return self._each(self._client.batch_results(batch))

    def close(self) -> None:
        self._portal.call(self._client.close)
        self._running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _each(self, things: AsyncGenerator[_T, None]) -> Iterator[_T]:
        try:
            while True:
                try:
                    yield self._portal.call(things.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            self._portal.call(things.aclose)

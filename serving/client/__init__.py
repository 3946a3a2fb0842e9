"""A client for a Rushes service: create videos, watch them while they are made, save them, submit batches.

    from serving.client import Rushes

    with Rushes("http://127.0.0.1:8000") as rushes:
        video = rushes.create("a red ball bouncing on a sand floor at sunset")
        for chunk in rushes.watch(video["id"]):
            show(chunk.frames())

`AsyncRushes` is the same for asyncio. Neither imports Ray or a model.
"""

from serving.client.errors import ApiError, RushesError, Unreachable, VideoFailed
from serving.client.realtime import AsyncRealtime, LiveChunk, Realtime
from serving.client.rushes import Rushes
from serving.client.rushes_async import AsyncRushes
from serving.client.wire import Chunk, Event

__all__ = [
    "ApiError",
    "AsyncRealtime",
    "AsyncRushes",
    "Chunk",
    "Event",
    "LiveChunk",
    "Realtime",
    "Rushes",
    "RushesError",
    "Unreachable",
    "VideoFailed",
]

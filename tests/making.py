"""A video that is made by a test: its chunks come when the test says so."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
from service import Service

from serving.jobs.artifacts import video_key
from serving.jobs.fragment_log import FragmentLog, LogWriter
from serving.jobs.store import Video
from serving.media.fmp4 import Codec, EncodedFragment, encode_fragment, remux_to_mp4

FPS = 16
CHUNKS = ((0, 9), (9, 21), (21, 33), (33, 45))


def made_fragments(codec: Codec = "h264") -> list[EncodedFragment]:
    y, x = np.mgrid[0:64, 0:64].astype(np.float32)
    clip = np.stack([np.stack([4 * x, 4 * y, np.full_like(x, 5 * n)], -1) for n in range(45)]).astype(np.uint8)
    return [
        encode_fragment(clip[start:stop], fps=FPS, index=index, first_frame=start, codec=codec)
        for index, (start, stop) in enumerate(CHUNKS)
    ]


FRAGMENTS = made_fragments()
WHOLE = FRAGMENTS[0].init + b"".join(fragment.data for fragment in FRAGMENTS)


class Making:
    """A video whose chunks come when the test says so."""

    def __init__(self, service: Service, video: Video, writer: LogWriter) -> None:
        self.service, self.video, self.writer = service, video, writer
        self.id = video.id
        self.fragments = FRAGMENTS

    @classmethod
    async def begun(cls, service: Service, video_id: str) -> Making:
        """Of the oldest queued video, which must be this one."""
        video = await service.claimed()
        assert video.id == video_id
        return cls(service, video, await FragmentLog.create(service.videos_dir, video_id, fence=video.fence))

    async def show(self, *indexes: int) -> None:
        for index in indexes:
            start, stop = CHUNKS[index]
            fragment = self.fragments[index]
            await self.writer.append(index, start, stop - start, fragment.init, fragment.data)
            if self.service.storage.copies is not None:
                await self.service.storage.copies.put(self.writer.log, index)

    async def complete(self) -> None:
        await self.writer.close()
        log, artifacts = self.writer.log, self.service.artifacts
        with artifacts.scratch() as path:
            remux_to_mp4(log.init(), log.fragments(), path)
            made = {"video.mp4": artifacts.put(video_key(self.id, "video.mp4"), path)}
        await self.service.store.complete(self.id, self.video.fence, artifacts=made)

    async def fail(self, *, in_log: bool = True) -> None:
        if in_log:
            await self.writer.fail("generation_failed", "out of memory")
        await self.service.store.fail(self.id, self.video.fence, "generation_failed", "out of memory")


async def queued(client: httpx.AsyncClient, **settings: Any) -> str:
    asked = {"prompt": "a red ball", "seconds": 3, "size": "64x64", **settings}
    answer = await client.post("/v1/videos", json=asked)
    assert answer.status_code == 200, answer.text
    video_id: str = answer.json()["id"]
    return video_id

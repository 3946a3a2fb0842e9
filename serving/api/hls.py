"""HTTP Live Streaming (RFC 8216bis): playlists of a video's fragment log, whatever state the video is in."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi import Path as PathParameter

from serving.api.auth import Owner
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.queueing import VideoQueue
from serving.api.watching import Shown, Watch, nothing_to_show
from serving.jobs.storage import Storage
from serving.media.fmp4 import codec_string
from serving.media.hls import INIT, MEDIA_PLAYLIST, Timeline, media_playlist, multivariant_playlist
from serving.media.pixels import describe

PLAYLIST_TYPE = "application/vnd.apple.mpegurl"
# How long an answer waits for a video that is queued, and for a playlist or a part that was announced.
# hls.js (1.7) gives those up after 20 and 9 seconds; after these here it asks again.
_BEGIN_SECONDS, _WAIT_SECONDS = 15.0, 8.0
# A variant's bandwidth is said before all of it is known.
_HEADROOM = 1.5
_LAST = {"Cache-Control": "private, max-age=3600, immutable"}
_LIVE = {"Cache-Control": "no-cache"}

_MOST = 1 << 31
Index = Annotated[int, PathParameter(ge=0, le=_MOST)]


def hls_router(storage: Storage, catalog: Catalog, queue: VideoQueue) -> APIRouter:
    router = APIRouter(prefix="/v1/videos/{video_id}/hls", tags=["hls"])

    async def watched(video_id: str, owner: str | None) -> Watch:
        return Watch(storage, await queue.existing(video_id, owner))

    @router.get("/master.m3u8", response_class=Response)
    async def multivariant(video_id: str, owner: Owner) -> Response:
        """The playlist to give to a player. Waits for the first chunk, which says what the video is."""
        watch = await watched(video_id, owner)
        shown = await _begun(watch)
        init = await watch.init()
        first = await watch.fragment(0)
        picture = await asyncio.to_thread(describe, init, first)
        rates = [8 * entry.size_bytes * picture.fps / entry.frames for entry in shown.entries]
        seconds = sum(entry.frames for entry in shown.entries) / picture.fps
        average = 8 * sum(entry.size_bytes for entry in shown.entries) / seconds
        headroom = 1.0 if shown.end is not None else _HEADROOM
        text = multivariant_playlist(
            codec=codec_string(init),
            width=picture.width,
            height=picture.height,
            fps=picture.fps,
            peak_bits=math.ceil(max(rates) * headroom),
            average_bits=math.ceil(average * headroom),
        )
        return Response(text, media_type=PLAYLIST_TYPE, headers=_LIVE)

    @router.get(f"/{MEDIA_PLAYLIST}", response_class=Response)
    async def playlist(
        video_id: str,
        owner: Owner,
        sequence: Annotated[int | None, Query(alias="_HLS_msn", ge=0, le=_MOST)] = None,
        part_index: Annotated[int | None, Query(alias="_HLS_part", ge=0, le=_MOST)] = None,
    ) -> Response:
        """Grows until the video ends. With `_HLS_msn` and `_HLS_part` it waits until that segment or part is there."""
        if part_index is not None and sequence is None:
            raise ApiError(400, "_HLS_part needs _HLS_msn.", param="_HLS_part", code="invalid_value")
        watch = await watched(video_id, owner)
        timeline = await _timeline(watch, catalog, await _begun(watch))
        if sequence is not None and not timeline.ended:
            if sequence > len(timeline.segments()) + 1:
                message = "_HLS_msn is too far ahead of the last segment."
                raise ApiError(400, message, param="_HLS_msn", code="invalid_value")
            timeline = await _grown(watch, catalog, timeline, sequence, part_index)
        return Response(media_playlist(timeline), media_type=PLAYLIST_TYPE, headers=_LIVE)

    @router.get(f"/{INIT}", response_class=Response)
    async def init(video_id: str, owner: Owner) -> Response:
        watch = await watched(video_id, owner)
        await _begun(watch)
        return Response(await watch.init(), media_type="video/mp4", headers=_LAST)

    @router.get("/parts/{index}.m4s", response_class=Response)
    async def part(video_id: str, index: Index, owner: Owner) -> Response:
        """One fragment. The next one, which playlists announce before it is there, is waited for."""
        watch = await watched(video_id, owner)
        shown = await watch.shown()
        if shown.end is None and index == len(shown.entries):
            shown = await watch.wait_for(index + 1, _WAIT_SECONDS)
        if index >= len(shown.entries):
            raise ApiError(404, f"There is no part {index}.", param="index", code="not_found")
        return Response(await watch.fragment(index), media_type="video/iso.segment", headers=_LAST)

    @router.get("/segments/{index}.m4s", response_class=Response)
    async def segment(video_id: str, index: Index, owner: Owner) -> Response:
        watch = await watched(video_id, owner)
        timeline = await _timeline(watch, catalog, await _begun(watch))
        found = next((s for s in timeline.segments() if s.index == index and s.whole), None)
        if found is None:
            raise ApiError(404, f"There is no segment {index}.", param="index", code="not_found")
        parts = [await watch.fragment(fragment) for fragment in range(found.first, found.stop)]
        return Response(b"".join(parts), media_type="video/iso.segment", headers=_LAST)

    return router


async def _begun(watch: Watch) -> Shown:
    """Wait for the first fragment. Raises `ApiError` when there is none and won't be, or not soon."""
    shown = await watch.wait_for(1, _BEGIN_SECONDS)
    if shown.entries:
        return shown
    if shown.end is not None:
        raise nothing_to_show(shown.end)
    raise ApiError(503, "The video has not begun yet.", code="video_not_ready", headers={"Retry-After": "2"})


async def _timeline(watch: Watch, catalog: Catalog, shown: Shown) -> Timeline:
    """Of a video that has begun."""
    frames = [entry.frames for entry in shown.entries]
    bundle = catalog.bundles.get(watch.video.model)
    if bundle is not None:
        manifest = bundle.manifest
        fps, longest = manifest.fps, manifest.chunk_latent_frames * manifest.latent.temporal
    else:  # not served any more: then no longer fragment will come
        fps, longest = describe(await watch.init(), await watch.fragment(0)).fps, max(frames)
    return Timeline(frames, fps, max(longest, *frames) / fps, ended=shown.end is not None)


async def _grown(watch: Watch, catalog: Catalog, timeline: Timeline, sequence: int, part: int | None) -> Timeline:
    """Wait until the timeline has what a player asked for (RFC 8216bis, 6.2.5.2), or the time is over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_WAIT_SECONDS):
            while not timeline.has(sequence, part):
                shown = await watch.wait_for(len(timeline.frames) + 1, _WAIT_SECONDS)
                timeline = await _timeline(watch, catalog, shown)
    return timeline

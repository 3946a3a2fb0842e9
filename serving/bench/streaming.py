"""What is measured of a causal model: what its viewers see, alone, together, and beside batch jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.bench.arrivals import at_once
from serving.bench.bench import Bench, idle
from serving.bench.calls import Engines, replay
from serving.bench.engines import default_spec
from serving.bench.figures import (
    BESIDE_BATCH,
    CHUNK_OVERHEAD,
    CLIP_LENGTH,
    FIRST_CHUNK,
    REAL_TIME,
    VIEWERS,
    Measured,
)
from serving.bench.following import Outcome, Target
from serving.bench.load import open_loop
from serving.bench.peers import completed
from serving.bench.statistics import Spread
from serving.bench.viewer import view

# What a player holds before it begins; hls.js and Shaka want more.
STARTUP_SECONDS = 1.0
SECONDS, SHORT_SECONDS, LONG_SECONDS = 8, 2, 60
MOST_VIEWERS = 16
_BATCH_LINES = 64
_BESIDE_BATCH = 0.75


async def one_viewer(bench: Bench) -> list[Measured]:
    """One stream bare and over HTTP by turns: to the first chunk, from chunk to chunk, and as a whole."""
    seconds = bench.seconds(SECONDS)
    video = await Engines(bench.bundle, bench.config).record(default_spec(bench.bundle, seconds=seconds))
    firsts, gaps, factors = [], [], []
    async with bench.target() as target:
        warm_up, *requests = bench.asks(bench.rounds + 1, seconds=seconds)
        completed(await target.make(warm_up))
        for number, ask in enumerate(requests):
            bench.say(f"one viewer, {number + 1} of {bench.rounds}")
            bare_first = sum(call.run() for call in video.first_chunk)
            bare = replay(video)
            outcome = completed(await target.make(ask))
            times = [chunk.at_seconds for chunk in outcome.chunks]
            firsts.append(1e3 * (times[0] - outcome.scheduled - bare_first))
            gaps.append(1e3 * (_gap(times) - _gap(bare)))
            factors.append((outcome.video_seconds or 0.0) / outcome.latency_seconds)
    steps = f"{video.spec.num_inference_steps} steps, {video.spec.width}x{video.spec.height}, "
    steps += f"the {video.spec.decoder} decoder"
    return [
        Measured(FIRST_CHUNK, Spread.of(firsts), steps),
        Measured(REAL_TIME, Spread.of(factors), f"{steps}, a clip of {seconds} s at {bench.bundle.manifest.fps} fps"),
        Measured(CHUNK_OVERHEAD, Spread.of(gaps), "from chunk to chunk over HTTP, less the same of the bare engines"),
    ]


async def viewers(bench: Bench, guess: float) -> tuple[list[Measured], int]:
    """The most streams at once that none of their viewers has an underrun of, and how many that is.

    `guess` is where to begin: up from there until one has, or down until none has.
    """
    count = min(max(1, int(guess)), MOST_VIEWERS)
    async with bench.target() as target:
        if await _all_smooth(bench, target, count):
            while count < MOST_VIEWERS and await _all_smooth(bench, target, count + 1):
                count += 1
        else:
            count -= 1
            while count and not await _all_smooth(bench, target, count):
                count -= 1
    note = f"clips of {bench.seconds(SECONDS)} s, begun at once; a viewer holds {STARTUP_SECONDS:g} s before the start"
    note += f"; no more than {MOST_VIEWERS} were tried" if count == MOST_VIEWERS else ""
    return [Measured(VIEWERS, Spread.of([count]), note)], count


async def beside_batch(bench: Bench, count: int) -> list[Measured]:
    """Three quarters of `count` streams without and with a batch of the same model in the queue, by turns.

    As many as there can be at all would leave nothing over for the batch, and none of them a moment to spare.
    """
    if not count:
        return [Measured(BESIDE_BATCH, None, "not even one stream is kept without batch jobs")]
    count, most = max(1, int(_BESIDE_BATCH * count)), count
    ratios = []
    async with bench.target() as target:
        for number in range(min(bench.rounds, 2)):
            bench.say(f"{count} streams without batch jobs, {number + 1} of {min(bench.rounds, 2)}")
            alone = sum(map(_smooth, await _streams(bench, target, count)))
            bench.say(f"{count} streams beside batch jobs, {number + 1} of {min(bench.rounds, 2)}")
            async with _batch(bench, target):
                beside = sum(map(_smooth, await _streams(bench, target, count)))
            if alone:
                ratios.append(beside / alone)
    if not ratios:
        return [Measured(BESIDE_BATCH, None, "no stream was kept without batch jobs")]
    return [Measured(BESIDE_BATCH, Spread.of(ratios), f"{count} streams of {most}, batch jobs of the same model")]


async def clip_length(bench: Bench) -> list[Measured]:
    """The first chunk of a short clip and of a long one by turns; the rest of both is cancelled."""
    short, long = bench.seconds(SHORT_SECONDS), bench.seconds(LONG_SECONDS)
    if long <= short:
        return [Measured(CLIP_LENGTH, None, f"the model makes no more than {long} s")]
    ratios = []
    async with bench.target() as target:
        requests = bench.asks(bench.rounds + 1)
        for number, ask in enumerate(requests):
            taken = {}
            for seconds in (short, long):
                bench.say(f"the first chunk of {seconds} s, {number} of {bench.rounds}")
                await idle(target)
                body = {**ask.body, "seconds": seconds, "seed": seconds + 1000 * number}
                # Another prompt, or the second of a pair would find its embedding in the cache.
                body["prompt"] = f"{ask.body['prompt']}, take {seconds}"
                taken[seconds] = await target.first_chunk_seconds(type(ask)(body))
            if number:  # the first pair warms up
                ratios.append(taken[long] / taken[short])
        await idle(target)
    return [Measured(CLIP_LENGTH, Spread.of(ratios), f"{long} s against {short} s")]


async def _all_smooth(bench: Bench, target: Target, count: int) -> bool:
    bench.say(f"{count} viewer{'s' if count > 1 else ''} at once")
    return all(map(_smooth, await _streams(bench, target, count)))


async def _streams(bench: Bench, target: Target, count: int) -> list[Outcome]:
    return await open_loop(target, at_once(bench.asks(count, seconds=bench.seconds(SECONDS))))


def _smooth(outcome: Outcome) -> bool:
    return outcome.error is None and view(outcome.chunks, STARTUP_SECONDS).smooth


@asynccontextmanager
async def _batch(bench: Bench, target: Target) -> AsyncIterator[None]:
    """While batch jobs are being made, more of them than there is time for; cancelled afterwards."""
    bodies = bench.asks(_BATCH_LINES, seed=1 << 20, seconds=bench.seconds(SECONDS))
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/videos", "body": dict(ask.body)}
        for number, ask in enumerate(bodies)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    upload = await target.http.post("/v1/files", files={"file": ("bench.jsonl", content)}, data={"purpose": "batch"})
    asked = {"input_file_id": upload.raise_for_status().json()["id"], "endpoint": "/v1/videos"}
    created = await target.http.post("/v1/batches", json={**asked, "completion_window": "24h"})
    batch_id = created.raise_for_status().json()["id"]
    try:
        while not (await target.http.get("/v1/load")).raise_for_status().json()["running"]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        yield
    finally:
        (await target.http.post(f"/v1/batches/{batch_id}/cancel")).raise_for_status()
        await idle(target)


def _gap(times: list[float]) -> float:
    """From one chunk to the next on average. Raises `ValueError` for fewer than two."""
    if len(times) < 2:
        raise ValueError("the video has one chunk, so nothing lies between chunks")
    return (times[-1] - times[0]) / (len(times) - 1)

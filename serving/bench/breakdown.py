"""Where a request's time went: what the engines need, what encoding to H.264 needs, and the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from models.bundle import Bundle
from serving.bench.calls import Call, Engines, VideoCalls
from serving.bench.engines import default_spec
from serving.bench.following import Outcome
from serving.bench.tables import seconds, share, table
from serving.config import ServiceConfig
from serving.media.fmp4 import encode_fragment

# What a request asks for that changes its engine calls.
_COSTLY = (
    "size",
    "seconds",
    "num_inference_steps",
    "guidance_scale",
    "guidance_interval",
    "guidance_cache",
    "cache",
    "decoder",
)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Seconds by part. Parts of chunks that are decoded and encoded while later ones are denoised cost a request no
    time of its own, so a causal video's may be more than the whole; `rest` is negative then."""

    whole: float
    parts: dict[str, float]

    @property
    def rest(self) -> float:
        return self.whole - sum(self.parts.values())


def explained(video: VideoCalls, whole_seconds: float, fps: int) -> Breakdown:
    """Run each part once more, alone, and set it against what a request took."""
    chunks = video.chunks
    encoding = 0.0
    for chunk in chunks:
        started = time.perf_counter()
        encode_fragment(chunk.frames, fps=fps, index=0, first_frame=0)
        encoding += time.perf_counter() - started
    parts = {
        "text encoder": _run(video.text),
        "denoiser": _run(call for chunk in chunks for call in chunk.denoise),
        "decoder": _run(call for chunk in chunks for call in chunk.decode),
        "encoding to H.264": encoding,
    }
    return Breakdown(whole_seconds, parts)


async def explained_each(bundle: Bundle, config: ServiceConfig, outcomes: Iterable[Outcome]) -> list[Breakdown]:
    """What the engines of `bundle` need for each request that was completed; each kind is timed once.

    Raises `EngineError`.
    """
    engines = Engines(bundle, config)
    timed: dict[str, Breakdown] = {}
    told = []
    for outcome in outcomes:
        if outcome.error is not None:
            continue
        settings = {name: outcome.ask.body.get(name) for name in _COSTLY}
        asked = json.dumps(settings)
        if asked not in timed:
            video = await engines.record(default_spec(bundle, **settings))
            timed[asked] = explained(video, 0.0, bundle.manifest.fps)
        once = timed[asked].parts
        # Each candidate is denoised, and only the best of them decoded.
        parts = once | {"denoiser": once["denoiser"] * int(outcome.ask.body.get("best_of") or 1)}
        told.append(replace(timed[asked], whole=outcome.latency_seconds, parts=parts))
    return told


def breakdown_table(told: Breakdown) -> str:
    parts = {**told.parts, "the rest: HTTP, queue, Ray, sampler, copies, log": told.rest, "whole": told.whole}
    rows = [(name, seconds(value), share(value / told.whole if told.whole else None)) for name, value in parts.items()]
    return table(["where a request's time goes", "takes", "of the whole"], rows)


def occupancy(told: Sequence[Breakdown], wall_seconds: float) -> dict[str, float]:
    """How busy each stage was at the most, as a share of the time: what these requests need alone over all of it.

    Calls that several requests share take less than the sum of what each takes alone, so it may be more than one.
    """
    sums: dict[str, float] = {}
    for one in told:
        for name, value in one.parts.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / wall_seconds if wall_seconds else 0.0 for name, value in sums.items()}


def occupancy_table(occupied: Mapping[str, float]) -> str:
    rows = [(name, share(value)) for name, value in occupied.items()]
    return table(["what the requests need alone, over the time that they took together", "of one engine's time"], rows)


def _run(calls: Iterable[Call]) -> float:
    return sum(call.run() for call in calls)

"""Where a request's time went: what the engines need, what encoding to H.264 needs, and the rest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from serving.bench.calls import Call, VideoCalls
from serving.bench.tables import seconds, share, table
from serving.media.fmp4 import encode_fragment


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

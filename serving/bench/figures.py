"""The figures that the service is held to: each with its bar, what was measured, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serving.bench.statistics import Spread
from serving.bench.tables import spread, table


@dataclass(frozen=True, slots=True)
class Bar:
    """At least or at most so much of a unit."""

    limit: float
    at_least: bool
    unit: str = ""

    def kept_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}"


@dataclass(frozen=True, slots=True)
class Figure:
    """`key` names it in JSON. It is kept when the median of what was measured keeps to the bar."""

    key: str
    name: str
    bar: Bar


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure's value, or why there is none; `note` says under which conditions."""

    figure: Figure
    value: Spread | None
    note: str = ""

    @property
    def kept(self) -> bool | None:
        return None if self.value is None else self.figure.bar.kept_by(self.value.median)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "kept": self.kept}


ONE_REQUEST = Figure(
    "one_request", "one request over HTTP ÷ the bare engine calls it needs (20 steps, guidance)", Bar(1.05, False)
)
FIRST_CHUNK = Figure(
    "first_chunk",
    "time to first chunk over HTTP less the bare one (encode, first chunk's steps, first decode), causal",
    Bar(40, False, " ms"),
)
THROUGHPUT = Figure(
    "throughput",
    "throughput at saturation ÷ what the engines alone sustain with the same batches",
    Bar(0.95, True),
)
PEER_EAGER = Figure("peer_eager", "diffusers in fp32, eager, one request ÷ ours over HTTP", Bar(4.5, True))
PEER_BEST = Figure("peer_best", "the best of diffusers in fp32, bf16 and compiled ÷ ours over HTTP", Bar(1.8, True))
REAL_TIME = Figure("real_time_factor", "causal: seconds of video in a second, one viewer", Bar(6, True))
VIEWERS = Figure("viewers", "causal: viewers at once without an underrun", Bar(5, True))
MIXED = Figure(
    "mixed",
    "16 concurrent mixed requests, P95 latency of the short ones: plain FastAPI queue ÷ ours",
    Bar(4, True),
)
BESIDE_BATCH = Figure(
    "beside_batch",
    "streams without an underrun while batch jobs take what is left ÷ without batch jobs",
    Bar(0.95, True),
)
CLIP_LENGTH = Figure("clip_length", "time to first chunk, 60-second clip ÷ 2-second clip, causal", Bar(1.05, False))
CHUNK_OVERHEAD = Figure(
    "chunk_overhead", "service overhead per chunk on the critical path, causal", Bar(3, False, " ms")
)

ALL = (
    ONE_REQUEST,
    FIRST_CHUNK,
    THROUGHPUT,
    PEER_EAGER,
    PEER_BEST,
    REAL_TIME,
    VIEWERS,
    MIXED,
    BESIDE_BATCH,
    CLIP_LENGTH,
    CHUNK_OVERHEAD,
)


def figures_table(measured: Sequence[Measured]) -> str:
    """Every figure in its order, those without a value too."""
    by_figure = {one.figure: one for one in measured}
    rows = []
    for figure in ALL:
        one = by_figure.get(figure, Measured(figure, None, "left out of this run"))
        value = "not measured" if one.value is None else spread(one.value) + figure.bar.unit
        kept = {None: "", True: "yes", False: "no"}[one.kept]
        rows.append((figure.name, value, str(figure.bar), kept, one.note))
    return table(["figure", "measured", "bar", "kept", "note"], rows)

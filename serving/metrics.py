"""Every number that the service exports, declared in one place: dashboards and alerts are checked against this list.

Code says `VIDEOS_ENDED.add(model="mini", outcome="completed")` wherever it is. Nothing is kept until a process says
where to (`send_to`); in the service that is Ray's exporter, which puts `ray_` in front of every name. Labels are
bounded: those with a list of values have no others, and models are those of the configuration.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]

# Each about twice the one before: what takes milliseconds in one installation takes minutes in another.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)
_RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_ROWS = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)

# What a label says that isn't one of its values: the number of series stays what it is, and the mistake shows.
OTHER = "other"
STAGES = ("text-encoder", "denoiser", "decoder")


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels` are names with the values that there may be; None means whatever the configuration names."""

    kind: Kind
    name: str
    help: str
    labels: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names of its series as Prometheus gets them from Ray's exporter."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return f"{name}_bucket", f"{name}_sum", f"{name}_count"
        return (f"{name}_total",) if self.kind == "counter" else (name,)


class Sink(Protocol):
    """Takes one value of a metric with all of its labels."""

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str], /) -> None: ...


@dataclass(slots=True)
class _Destination:
    sink: Sink | None = None
    constants: Mapping[str, str] = field(default_factory=dict)


_destination = _Destination()
_labels: ContextVar[Mapping[str, str]] = ContextVar("rushes_labels", default={})  # noqa: B039 - never changed


def send_to(sink: Sink | None, **constants: str) -> None:
    """Where this process's measurements go from now on, and labels that are the same for all of them, where a metric
    has those."""
    _destination.sink, _destination.constants = sink, constants


@contextmanager
def labelled(**labels: str) -> Iterator[None]:
    """What is opened in this block measures with these labels: `labels_here` says them."""
    token = _labels.set({**_labels.get(), **labels})
    try:
        yield
    finally:
        _labels.reset(token)


def labels_here() -> Mapping[str, str]:
    """For what measures later, and in other threads: to be kept, and said with each value."""
    return _labels.get()


def _record(metric: Metric, value: float, given: Mapping[str, str]) -> None:
    if _destination.sink is None:
        return
    known = {**_destination.constants, **given}
    labels = {}
    for name, values in metric.labels.items():
        value_of = known.get(name, OTHER)
        labels[name] = value_of if values is None or value_of in values else OTHER
    _destination.sink(metric, value, labels)


class Counter(Metric):
    def add(self, count: float = 1.0, /, **labels: str) -> None:
        if count > 0:
            _record(self, count, labels)


class Gauge(Metric):
    def set(self, value: float, /, **labels: str) -> None:
        _record(self, value, labels)


class Histogram(Metric):
    def observe(self, value: float, /, **labels: str) -> None:
        _record(self, value, labels)

    @contextmanager
    def time(self, failures: type[Exception] = Exception, **labels: str) -> Iterator[None]:
        """How long the block takes, in seconds, with the label `outcome`: `error` when it raises one of `failures`."""
        started, outcome = time.monotonic(), "ok"
        try:
            yield
        except failures:
            outcome = "error"
            raise
        finally:
            self.observe(time.monotonic() - started, outcome=outcome, **labels)


_STAGE: Mapping[str, tuple[str, ...] | None] = {"model": None, "stage": STAGES}
_MODEL: Mapping[str, tuple[str, ...] | None] = {"model": None}
_OUTCOMES = ("ok", "error")

STAGE_WAITING = Gauge("gauge", "rushes_stage_waiting", "Calls or videos that wait for a place in a replica.", _STAGE)
STAGE_IN_FLIGHT = Gauge("gauge", "rushes_stage_in_flight", "Calls or videos that a replica works on.", _STAGE)
STAGE_OUTSTANDING = Gauge(
    "gauge", "rushes_stage_outstanding_seconds", "Work in a replica's hand, in seconds on its own hardware.", _STAGE
)
STAGE_BUSY = Counter(
    "counter", "rushes_stage_busy_seconds", "Seconds spent in engine calls; their rate is the occupancy.", _STAGE
)
STAGE_CALL = Histogram(
    "histogram", "rushes_stage_call_seconds", "One engine call: a denoiser's is a step.", _STAGE, _SECONDS
)
BATCH_ROWS = Histogram(
    "histogram", "rushes_denoiser_batch_rows", "Rows of one denoiser call, two for a guided video.", _MODEL, _ROWS
)
EMBEDDINGS = Counter(
    "counter",
    "rushes_embeddings",
    "Prompts that the text encoder was asked for.",
    {"model": None, "cache": ("hit", "miss")},
)
FIRST_CHUNK = Histogram(
    "histogram",
    "rushes_video_first_chunk_seconds",
    "From a video's creation to its first visible chunk.",
    _MODEL,
    _SECONDS,
)
CHUNK_INTERVAL = Histogram(
    "histogram", "rushes_video_chunk_interval_seconds", "From one visible chunk to the next.", _MODEL, _SECONDS
)
REALTIME_FACTOR = Histogram(
    "histogram",
    "rushes_video_realtime_factor",
    "Seconds of making for a second of video, from the claim to the file.",
    _MODEL,
    _RATIOS,
)
DEADLINES = Counter(
    "counter",
    "rushes_video_chunks",
    "Chunks made, by whether a player that began with the first had to wait for it.",
    {"model": None, "deadline": ("met", "missed")},
)
VIDEOS_ENDED = Counter(
    "counter",
    "rushes_videos_ended",
    "Attempts at videos, by how they ended.",
    {"model": None, "outcome": ("completed", "failed", "cancelled", "requeued", "stale")},
)
JOBS = Gauge(
    "gauge",
    "rushes_jobs",
    "Videos in the store by state; every runner says the same.",
    {"state": ("queued", "held", "in_progress", "lapsed")},
)
OLDEST_JOB = Gauge("gauge", "rushes_jobs_oldest_queued_seconds", "How long the first of the queue has waited.")
RUNNING = Gauge("gauge", "rushes_runner_videos", "Videos that a runner has in hand.")
STORE = Histogram(
    "histogram",
    "rushes_store_seconds",
    "A transaction in the database.",
    {"operation": ("read", "write"), "outcome": _OUTCOMES},
    _SECONDS,
)
ARTIFACTS = Histogram(
    "histogram",
    "rushes_artifact_seconds",
    "A file put into the artifact store or fetched from it, with every try.",
    {"operation": ("put", "fetch"), "outcome": _OUTCOMES},
    _SECONDS,
)
WEBHOOKS = Counter(
    "counter",
    "rushes_webhooks",
    "Tries at telling a target of an event.",
    {"outcome": ("delivered", "retried", "given_up")},
)
BUILD_INFO = Gauge(
    "gauge", "rushes_build_info", "1; what runs is in the labels.", {"version": None, "ray": None, "onnxruntime": None}
)

ALL: Sequence[Metric] = (
    STAGE_WAITING,
    STAGE_IN_FLIGHT,
    STAGE_OUTSTANDING,
    STAGE_BUSY,
    STAGE_CALL,
    BATCH_ROWS,
    EMBEDDINGS,
    FIRST_CHUNK,
    CHUNK_INTERVAL,
    REALTIME_FACTOR,
    DEADLINES,
    VIDEOS_ENDED,
    JOBS,
    OLDEST_JOB,
    RUNNING,
    STORE,
    ARTIFACTS,
    WEBHOOKS,
    BUILD_INFO,
)


def exported_names() -> frozenset[str]:
    """Every series that the service exports."""
    return frozenset(name for metric in ALL for name in metric.exported)

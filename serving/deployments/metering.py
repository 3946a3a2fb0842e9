"""Measurements through Ray's own exporter: every node's `/metrics` has them beside Ray's, under `ray_rushes_…`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import onnxruntime
import ray
from ray import serve
from ray.serve import metrics as ray_metrics

from serving.metrics import (
    BUILD_INFO,
    JOBS,
    OLDEST_JOB,
    RUNNING,
    STAGE_IN_FLIGHT,
    STAGE_OUTSTANDING,
    STAGE_WAITING,
    STAGES,
    Metric,
    send_to,
)
from serving.pipeline.pace import StageState

if TYPE_CHECKING:
    from serving.jobs.census import Census  # a stage has no database, and starts sooner without what one needs

_LOOK_SECONDS = 1.0
_COUNT_SECONDS = 5.0


class RayMetrics:
    """A `Sink`. Ray Serve adds which deployment, replica and application it was."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str], /) -> None:
        made = self._made.get(metric.name)
        if made is None:
            made = self._made[metric.name] = _make(metric)
        tags = dict(labels)
        if metric.kind == "counter":
            made.inc(value, tags)
        elif metric.kind == "gauge":
            made.set(value, tags)
        else:
            made.observe(value, tags)


def _make(metric: Metric) -> Any:
    names = tuple(metric.labels)
    if metric.kind == "counter":
        return ray_metrics.Counter(metric.name, metric.help, names)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(metric.name, metric.help, names)
    return ray_metrics.Histogram(metric.name, metric.help, boundaries=list(metric.buckets), tag_keys=names)


def start_metering() -> None:
    """From here on this replica's measurements are exported; a stage's say of which model and stage they are."""
    deployment = serve.get_replica_context().deployment
    stage = next((name for name in STAGES if deployment.endswith(f"-{name}")), None)
    constants = {} if stage is None else {"model": deployment.removesuffix(f"-{stage}"), "stage": stage}
    send_to(RayMetrics(), **constants)


async def report_stage(state: Callable[[], StageState], **labels: str) -> None:
    """Say how a stage stands, until this is cancelled: Ray forgets a gauge that isn't said again.

    `labels` are for a process that has more than the one stage that it is named after.
    """
    while True:
        now = state()
        STAGE_WAITING.set(now.waiting, **labels)
        STAGE_IN_FLIGHT.set(now.in_flight, **labels)
        STAGE_OUTSTANDING.set(now.outstanding_seconds, **labels)
        await asyncio.sleep(_LOOK_SECONDS)


async def report_jobs(census: Census, running: Callable[[], int]) -> None:
    """The same of the queue, for a runner. A store that is away says nothing, and that shows."""
    build = {"version": version("rushes"), "ray": ray.__version__, "onnxruntime": onnxruntime.__version__}
    while True:
        BUILD_INFO.set(1, **build)
        RUNNING.set(running())
        try:
            counted = await census.take()
        except Exception:  # whoever needs the store says so
            counted = None
        if counted is not None:
            for name, count in counted.by_state.items():
                JOBS.set(count, state=name)
            OLDEST_JOB.set(counted.oldest_queued_seconds)
        await asyncio.sleep(_COUNT_SECONDS)

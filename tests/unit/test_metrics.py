"""What the service measures, and that a label can't grow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest

from serving.deployments.timing import Timing
from serving.jobs.video import Video
from serving.metrics import (
    ALL,
    DEADLINES,
    STAGE_CALL,
    STORE,
    VIDEOS_ENDED,
    WEBHOOKS,
    Metric,
    exported_names,
    labelled,
    send_to,
)
from serving.pipeline.pace import Pace


class Recorded:
    """A `Sink` that keeps everything."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float, Mapping[str, str]]] = []

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str], /) -> None:
        self.values.append((metric.name, value, labels))

    def of(self, metric: Metric) -> list[tuple[float, Mapping[str, str]]]:
        return [(value, labels) for name, value, labels in self.values if name == metric.name]


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    sink = Recorded()
    send_to(sink, model="tiny", stage="denoiser")
    yield sink
    send_to(None)


def test_names_are_prometheus_names_with_units_and_help() -> None:
    assert len({metric.name for metric in ALL}) == len(ALL)
    for metric in ALL:
        assert re.fullmatch(r"rushes_[a-z][a-z_]+", metric.name)
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket")), "Ray and Prometheus add these"
        assert metric.help.endswith(".") or metric.name == "rushes_build_info"
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(metric.buckets)
    assert "ray_rushes_stage_call_seconds_bucket" in exported_names()
    assert "ray_rushes_webhooks_total" in exported_names()


def test_a_process_says_once_what_all_its_measurements_have_in_common(recorded: Recorded) -> None:
    STAGE_CALL.observe(0.5)
    VIDEOS_ENDED.add(model="other-model", outcome="completed")
    assert recorded.of(STAGE_CALL) == [(0.5, {"model": "tiny", "stage": "denoiser"})]
    assert recorded.of(VIDEOS_ENDED) == [(1, {"model": "other-model", "outcome": "completed"})]


def test_a_value_that_is_not_declared_makes_no_series_of_its_own(recorded: Recorded) -> None:
    WEBHOOKS.add(outcome="https://example.com/whatever")
    WEBHOOKS.add()
    assert {labels["outcome"] for _, labels in recorded.of(WEBHOOKS)} == {"other"}


def test_nothing_is_kept_of_a_process_that_exports_nothing(recorded: Recorded) -> None:
    send_to(None)
    STAGE_CALL.observe(1.0)
    assert not recorded.values


def test_a_stage_that_shares_its_process_says_which_it_is(recorded: Recorded) -> None:
    with labelled(model="mini", stage="decoder"):
        decoder = Pace()
    with labelled(model="mini", stage="denoiser"):
        denoiser = Pace()
    decoder.took(1, 0.5)
    denoiser.took(1, 0.25)
    assert recorded.of(STAGE_CALL) == [
        (0.5, {"model": "mini", "stage": "decoder"}),
        (0.25, {"model": "mini", "stage": "denoiser"}),
    ]


def test_what_goes_wrong_is_timed_too(recorded: Recorded) -> None:
    with pytest.raises(OSError, match="gone"), STORE.time(OSError, operation="read"):
        raise OSError("gone")
    with pytest.raises(KeyError), STORE.time(OSError, operation="read"):
        raise KeyError("not the store's fault")
    assert [labels["outcome"] for _, labels in recorded.of(STORE)] == ["error", "ok"]


def test_a_pace_is_learnt_and_changes_with_the_hardware() -> None:
    pace = Pace()
    assert pace.seconds(100) == 0
    pace.took(10, 1.0)
    assert pace.seconds(100) == pytest.approx(10)
    for _ in range(500):
        pace.took(10, 2.0)
    assert pace.seconds(100) == pytest.approx(20, rel=0.01)


def made(recorded: Recorded, *chunks: tuple[float, int]) -> Timing:
    """A four-second video of 64 frames, created at 90 and claimed at 100, with its chunks' times and first frames."""
    now = 100.0
    timing = Timing(Video("video_1", "tiny", "", "4", "64x64", created_at=90.0), 64, lambda: now)
    for at, first_frame in chunks:
        now = at
        timing.chunk(first_frame)
    now = 112.0
    timing.ended("completed")
    return timing


def test_a_video_is_timed_as_its_viewers_see_it(recorded: Recorded) -> None:
    made(recorded, (102.0, 0), (102.5, 16), (105.0, 32))
    values = {name: value for name, value, _ in recorded.values}
    assert values["rushes_video_first_chunk_seconds"] == 12
    assert values["rushes_video_realtime_factor"] == 3
    intervals = [value for name, value, _ in recorded.values if name == "rushes_video_chunk_interval_seconds"]
    assert intervals == [0.5, 2.5]
    # Needed at 102, 103 and 104.
    assert [labels["deadline"] for _, labels in recorded.of(DEADLINES)] == ["met", "met", "missed"]


def test_a_resumed_video_has_no_deadlines_that_anybody_knows(recorded: Recorded) -> None:
    made(recorded, (102.0, 16), (103.0, 32))
    assert not recorded.of(DEADLINES)
    assert not [name for name, _, _ in recorded.values if name == "rushes_video_first_chunk_seconds"]

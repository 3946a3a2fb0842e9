"""What a run of requests comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.bench.following import Outcome
from serving.bench.statistics import Summary
from serving.bench.viewer import view


@dataclass(frozen=True, slots=True)
class Goals:
    """What a request should keep to; None: nothing is asked of it. An error keeps to nothing."""

    latency_seconds: float | None = None
    first_chunk_seconds: float | None = None
    startup_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Viewers:
    """What somebody who plays each stream would have seen, with `startup_seconds` of video before the start."""

    count: int
    without_underrun: float
    underruns: int
    stall_seconds: float
    chunk_deadlines_met: float
    start_seconds: Summary | None


@dataclass(frozen=True, slots=True)
class Attained:
    """The shares of all requests that kept to each goal, and to all of them."""

    latency: float | None
    first_chunk: float | None
    both: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """Times in seconds; of requests that were completed, but for `errors` and `attained`.

    `real_time_factor` is seconds of video over seconds from request to end. `phases` is where a stream's client waited:
    until it was accepted, until the first chunk, until the last one, and until the end was said.
    """

    requests: int
    completed: int
    errors: dict[str, int]
    wall_seconds: float
    requests_per_second: float
    video_seconds_per_second: float
    latency: Summary | None
    first_chunk: Summary | None
    between_chunks: Summary | None
    real_time_factor: Summary | None
    phases: dict[str, Summary]
    viewers: Viewers | None
    attained: Attained
    sent_late: Summary | None
    labels: dict[str, Report] = field(default_factory=dict)


def report(outcomes: Sequence[Outcome], goals: Goals | None = None) -> Report:
    """Also for each label, when there is more than one."""
    goals = goals or Goals()
    whole = _report(outcomes, goals)
    labels = dict.fromkeys(outcome.ask.label for outcome in outcomes)
    if len(labels) < 2:
        return whole
    for label in labels:
        whole.labels[label or "other"] = _report([o for o in outcomes if o.ask.label == label], goals)
    return whole


def _report(outcomes: Sequence[Outcome], goals: Goals) -> Report:
    completed = [outcome for outcome in outcomes if outcome.error is None]
    start = min((outcome.scheduled for outcome in outcomes), default=0.0)
    wall = max((outcome.ended for outcome in outcomes), default=0.0) - start
    made = sum(outcome.video_seconds or 0.0 for outcome in completed)
    return Report(
        requests=len(outcomes),
        completed=len(completed),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        wall_seconds=wall,
        requests_per_second=len(completed) / wall if wall else 0.0,
        video_seconds_per_second=made / wall if wall else 0.0,
        latency=Summary.of(outcome.latency_seconds for outcome in completed),
        first_chunk=Summary.of(o.first_chunk_seconds for o in completed if o.first_chunk_seconds is not None),
        between_chunks=Summary.of(gap for outcome in completed for gap in outcome.between_chunks),
        real_time_factor=Summary.of(
            o.video_seconds / o.latency_seconds for o in completed if o.video_seconds and o.latency_seconds > 0
        ),
        phases=_phases(completed),
        viewers=_viewers(completed, goals.startup_seconds),
        attained=_attained(outcomes, goals),
        sent_late=Summary.of(max(0.0, outcome.sent - outcome.scheduled) for outcome in outcomes),
    )


def _phases(completed: Sequence[Outcome]) -> dict[str, Summary]:
    spans: dict[str, list[float]] = {}
    for outcome in completed:
        marks = [("until it is accepted", outcome.accepted)]
        if outcome.chunks:
            marks.append(("until the first chunk", outcome.chunks[0].at_seconds))
            marks.append(("until the last chunk", outcome.chunks[-1].at_seconds))
        marks.append(("until the end is said", outcome.ended))
        before = outcome.scheduled
        for name, at in marks:
            if at is not None:
                spans.setdefault(name, []).append(at - before)
                before = at
    summaries = {name: Summary.of(values) for name, values in spans.items()}
    return {name: summary for name, summary in summaries.items() if summary is not None}


def _viewers(completed: Sequence[Outcome], startup_seconds: float) -> Viewers | None:
    streams = [outcome for outcome in completed if outcome.chunks]
    if not streams:
        return None
    viewings = [view(outcome.chunks, startup_seconds) for outcome in streams]
    late, chunks = sum(viewing.late for viewing in viewings), sum(viewing.chunks for viewing in viewings)
    return Viewers(
        count=len(viewings),
        without_underrun=sum(viewing.smooth for viewing in viewings) / len(viewings),
        underruns=late,
        stall_seconds=sum(viewing.stall_seconds for viewing in viewings),
        chunk_deadlines_met=1 - late / chunks,
        start_seconds=Summary.of(v.start_seconds - o.scheduled for v, o in zip(viewings, streams, strict=True)),
    )


def _attained(outcomes: Sequence[Outcome], goals: Goals) -> Attained:
    def share(kept: Sequence[bool]) -> float | None:
        return sum(kept) / len(kept) if kept else None

    by_latency = [o.error is None and o.latency_seconds <= (goals.latency_seconds or 0.0) for o in outcomes]
    by_first = [
        o.error is None and o.first_chunk_seconds is not None and o.first_chunk_seconds <= goals.first_chunk_seconds
        for o in outcomes
        if goals.first_chunk_seconds is not None
    ]
    latency = share(by_latency) if goals.latency_seconds is not None else None
    first_chunk = share(by_first)
    both = None
    if latency is not None and first_chunk is not None:
        both = share([a and b for a, b in zip(by_latency, by_first, strict=True)])
    return Attained(latency, first_chunk, both)

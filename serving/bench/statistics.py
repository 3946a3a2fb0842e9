"""Figures of many figures: percentiles, spreads, and the rate at which something goes on."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Summary:
    """Of `count` values; percentiles lie between the two nearest ones, as numpy's do."""

    count: int
    mean: float
    least: float
    p50: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """None of no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.95, 0.99))
        return cls(len(ordered), statistics.fmean(ordered), ordered[0], p50, p95, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure measured `count` times: the median, and the least and the most of them."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Raises `ValueError` of no values."""
        if not values:
            raise ValueError("nothing was measured")
        return cls(statistics.median(values), min(values), max(values), len(values))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, of which there is one at least."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def steady_rate(times: Iterable[float], skipped: int) -> float:
    """How many a second happen, without the first and the last `skipped` of these times: what fills up and what runs
    out would be slower. Raises `ValueError` when fewer than one more than twice as many are left."""
    ordered = sorted(times)
    skipped = max(skipped, 1)
    if len(ordered) <= 2 * skipped:
        raise ValueError(f"{len(ordered)} times are too few to leave out {skipped} at each end")
    start, end = ordered[skipped - 1], ordered[len(ordered) - skipped - 1]
    if end <= start:
        raise ValueError("all of it happened at once")
    return (len(ordered) - 2 * skipped) / (end - start)

"""What engine calls take, learned from those that were made."""

from __future__ import annotations

from collections.abc import Hashable

# How much of a new measurement goes into what is remembered: one slow call doesn't change the plan.
_WEIGHT = 0.2
_MOST_SHAPES = 64


class CallCosts:
    """Seconds a call, by shape and rows: a moving average of what was measured, and an estimate for the rest."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Hashable, ...], dict[int, float]] = {}
        self._per_token = 0.0

    def observe(self, shape: tuple[Hashable, ...], rows: int, tokens: int, seconds: float) -> None:
        """A call of `rows` rows, `tokens` tokens in all, took so long."""
        by_rows = self._seconds.pop(shape, {})  # put back as the newest
        by_rows[rows] = _moved(by_rows.get(rows), seconds)
        self._seconds[shape] = by_rows
        self._per_token = _moved(self._per_token or None, seconds / tokens)
        if len(self._seconds) > _MOST_SHAPES:
            del self._seconds[next(iter(self._seconds))]

    def seconds(self, shape: tuple[Hashable, ...], rows: int, tokens: int) -> float:
        """What such a call will take; 0 before anything is known.

        Rows that weren't measured take their share of the nearest number that was: as if batching gained nothing, which
        is what an engine that is full does.
        """
        by_rows = self._seconds.get(shape)
        if not by_rows:
            return self._per_token * tokens
        nearest = min(by_rows, key=lambda known: (abs(known - rows), known))
        return by_rows[nearest] * rows / nearest


def _moved(before: float | None, seconds: float) -> float:
    return seconds if before is None else before + _WEIGHT * (seconds - before)

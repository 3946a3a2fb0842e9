"""A viewer who plays a video while it comes: where it would have stood still, and for how long. No clock of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrived:
    """A chunk that was whole `at_seconds` after the request, and plays for `seconds`."""

    at_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Viewing:
    """`late` chunks of `chunks` weren't there when the picture needed them: each is an underrun."""

    start_seconds: float
    stall_seconds: float
    late: int
    chunks: int

    @property
    def smooth(self) -> bool:
        return self.late == 0


def view(chunks: Sequence[Arrived], startup_seconds: float = 0.0) -> Viewing:
    """Play chunks in their order. The viewer begins once `startup_seconds` of video are there, or all of it, and goes
    on after an underrun as soon as the missing chunk has come.

    A chunk is due when those before it have been played; what a stall takes puts off all later ones. Raises
    `ValueError` when there is no chunk.
    """
    if not chunks:
        raise ValueError("there is nothing to view")
    start = _start(chunks, startup_seconds)
    due, stalled, late = start, 0.0, 0
    for chunk in chunks:
        if chunk.at_seconds > due:
            late += 1
            stalled += chunk.at_seconds - due
            due = chunk.at_seconds
        due += chunk.seconds
    return Viewing(start, stalled, late, len(chunks))


def _start(chunks: Sequence[Arrived], startup_seconds: float) -> float:
    buffered, there = 0.0, 0.0
    for chunk in chunks:
        there = max(there, chunk.at_seconds)
        buffered += chunk.seconds
        if buffered >= startup_seconds:
            break
    return there

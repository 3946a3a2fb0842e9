"""The step scheduler: which sessions run in the denoiser's next call. No clock, no engine, no waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

_TRACE_LINES = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine call may hold: rows, and rows times tokens per row."""

    max_rows: int = 8
    max_tokens: int = 1 << 15

    def __post_init__(self) -> None:
        if self.max_rows < 2:
            raise ValueError(f"max_rows must be at least 2 (a guided video has two rows), not {self.max_rows}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, not {self.max_tokens}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One session as the scheduler sees it. Only sessions with equal `shape` can share a call."""

    id: Hashable
    shape: tuple[Hashable, ...]
    rows: int
    tokens_per_row: int
    steps: int
    priority: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.tokens_per_row


@dataclass(frozen=True, slots=True)
class TraceLine:
    """What the scheduler did: these sessions `ran` in step `step`, or were `removed` unfinished after it."""

    step: int
    event: Literal["ran", "removed"]
    sessions: tuple[Hashable, ...]


@dataclass(slots=True)
class _Place:
    """`used` is the engine work, in tokens weighted by priority, that the session has had since a common zero."""

    entry: Entry
    order: int
    remaining: int
    used: float


class StepScheduler:
    """Shares the engine fairly between sessions, by work (stride scheduling, Waldspurger & Weihl 1995).

    The session that has had the least work leads the next call; others of its shape that have had least fill it up.
    Work is counted in tokens, so that a short preview isn't held up by a long video for as many calls as it has steps,
    and each priority level doubles a session's share. A new session starts level with the one served last: it can
    neither overtake for work it didn't ask for while away, nor be overtaken for ever. So every session runs again after
    bounded work.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places: dict[Hashable, _Place] = {}
        self._level = 0.0
        self._order = 0
        self._steps = 0
        self._trace: deque[TraceLine] = deque(maxlen=_TRACE_LINES)

    @property
    def trace(self) -> Sequence[TraceLine]:
        """The last some hundred lines, oldest first."""
        return tuple(self._trace)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def outstanding_tokens(self) -> int:
        """The work that is left: rows times tokens times steps over all sessions."""
        return sum(p.remaining * p.entry.tokens for p in self._places.values())

    def add(self, entry: Entry) -> None:
        """Raises `ValueError` for a session that no call could hold, or whose id is here already."""
        if entry.id in self._places:
            raise ValueError(f"session {entry.id!r} is already scheduled")
        if entry.rows > self._limits.max_rows or entry.tokens > self._limits.max_tokens:
            raise ValueError(
                f"a session of {entry.rows} rows and {entry.tokens} tokens is over the denoiser's limit of "
                f"{self._limits.max_rows} rows and {self._limits.max_tokens} tokens a call"
            )
        if entry.steps < 1 or entry.rows < 1 or entry.tokens_per_row < 1:
            raise ValueError(f"nothing to run: {entry}")
        self._order += 1
        self._places[entry.id] = _Place(entry, self._order, entry.steps, self._level)

    def reshape(self, id: Hashable, shape: tuple[Hashable, ...], tokens_per_row: int) -> None:
        """From its next step on a session is of another shape; harmless when it isn't here.

        It must not have become larger, or no call might hold it.
        """
        if (place := self._places.get(id)) is not None:
            place.entry = replace(place.entry, shape=shape, tokens_per_row=tokens_per_row)

    def remove(self, id: Hashable) -> None:
        """Harmless when the session isn't here."""
        if self._places.pop(id, None) is not None:
            self._trace.append(TraceLine(self._steps, "removed", (id,)))

    def next_step(self) -> list[Hashable]:
        """The sessions that run one step now, all of one shape; empty when there are none.

        Each is charged for the step; one whose last step this is leaves the scheduler.
        """
        waiting = sorted(self._places.values(), key=lambda p: (p.used, p.order))
        if not waiting:
            return []
        leader = waiting[0]
        self._level = leader.used
        rows, tokens = self._limits.max_rows, self._limits.max_tokens
        chosen: list[Hashable] = []
        for place in waiting:
            entry = place.entry
            if entry.shape != leader.entry.shape or entry.rows > rows or entry.tokens > tokens:
                continue
            rows -= entry.rows
            tokens -= entry.tokens
            chosen.append(entry.id)
            self._charge(place)
        self._steps += 1
        self._trace.append(TraceLine(self._steps, "ran", tuple(chosen)))
        return chosen

    def _charge(self, place: _Place) -> None:
        place.used += place.entry.tokens / 2.0**place.entry.priority
        place.remaining -= 1
        if place.remaining == 0:
            del self._places[place.entry.id]

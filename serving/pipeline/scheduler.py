"""The step scheduler: which sessions run in the denoiser's next call. No clock, no engine, no waiting."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from serving.pipeline.costs import CallCosts

_TRACE_LINES = 256
# However late the streams are, one call in so many goes to whoever is due by its share.
_FAIR_EVERY = 8
# Rows of which the second costs so much of the first are worth a call together, even if that makes the first wait.
_WORTH_JOINING = 0.7


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine call may hold: rows, and rows times tokens per row. `turn_calls` is how many calls a session may
    be ahead of another before that one has its turn: about as many as a video has steps."""

    max_rows: int = 8
    max_tokens: int = 1 << 15
    turn_calls: int = 32

    def __post_init__(self) -> None:
        if self.max_rows < 2:
            raise ValueError(f"max_rows must be at least 2 (a guided video has two rows), not {self.max_rows}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, not {self.max_tokens}")
        if self.turn_calls < 1:
            raise ValueError(f"turn_calls must be positive, not {self.turn_calls}")


@dataclass(frozen=True, slots=True)
class Due:
    """When somebody will want to see what the next `calls` calls of a session make, on the caller's clock."""

    at: float
    calls: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One session as the scheduler sees it. Only sessions with equal `shape` can share a call.

    `rows_left` are those of all its steps together, if they don't have `rows` each. Nobody watches one without `due`
    while it is made.
    """

    id: Hashable
    shape: tuple[Hashable, ...]
    rows: int
    tokens_per_row: int
    steps: int
    priority: int = 0
    due: Due | None = None
    rows_left: int | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.tokens_per_row


@dataclass(frozen=True, slots=True)
class TraceLine:
    """What the scheduler did: these sessions `ran` in step `step`, or were `removed` unfinished after it."""

    step: int
    event: Literal["ran", "removed"]
    sessions: tuple[Hashable, ...]


@dataclass(slots=True, eq=False)
class _Place:
    """`used` is the engine work, in tokens weighted by priority, that the session has had since a common zero."""

    entry: Entry
    order: int
    remaining: int
    used: float

    @property
    def tokens_left(self) -> int:
        """The work of all its steps that are still to run."""
        entry = self.entry
        return (self.remaining * entry.rows if entry.rows_left is None else entry.rows_left) * entry.tokens_per_row


class StepScheduler:
    """Shares the engine fairly between sessions by work, a turn at a time, but for streams that would run dry.

    Shares are by stride scheduling (Waldspurger & Weihl 1995): a session that another is a turn of work ahead of goes
    before it. Work is counted in tokens, and each priority level doubles a session's share. Of those whose turn it is,
    the highest priority leads the next call, and of equals the one that has least left to do: so the short don't wait
    for the long, and equal videos end one after another, when all of them in step would end together at last. Others
    of its shape fill the call up, in the same order. A new session starts level with the one that is furthest on of
    those that led: it can neither overtake for work it didn't ask for while away, nor be overtaken for ever. So every
    session runs again after bounded work.

    A session that is `due` so soon that it can't wait for another call goes first, the earliest of them before the
    others. Whatever else would fit into its call is left out if that made it late, unless rows are cheaper together.
    What such sessions take is charged to them like all work, and every now and then a call goes by shares alone: they
    can slow the others down, not stop them.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places: dict[Hashable, _Place] = {}
        self._level = 0.0
        self._order = 0
        self._steps = 0
        self._urgent_calls = 0  # since the last one that went by shares
        self._costs = CallCosts()
        self._trace: deque[TraceLine] = deque(maxlen=_TRACE_LINES)

    @property
    def trace(self) -> Sequence[TraceLine]:
        """The last some hundred lines, oldest first."""
        return tuple(self._trace)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def outstanding_tokens(self) -> int:
        """The work that is left: the tokens of all rows of all steps, over all sessions."""
        return sum(place.tokens_left for place in self._places.values())

    def slack_seconds(self, id: Hashable, now: float) -> float:
        """How long a session could wait and still be in time: less than nothing when it is late, and for ever when it
        isn't due or isn't here."""
        place = self._places.get(id)
        return math.inf if place is None else self._slack(place, now)

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

    def reshape(
        self, id: Hashable, shape: tuple[Hashable, ...], tokens_per_row: int, *, rows: int, due: Due | None = None
    ) -> None:
        """From its next step on a session is of another shape, and due at another time; harmless when it isn't here.

        It must not have become larger than it ever was, or no call might hold it.
        """
        if (place := self._places.get(id)) is not None:
            place.entry = replace(place.entry, shape=shape, tokens_per_row=tokens_per_row, rows=rows, due=due)

    def took(self, shape: tuple[Hashable, ...], rows: int, tokens: int, seconds: float) -> None:
        """A call of this shape, with `tokens` tokens in all its rows, took so long: the next are judged by it."""
        self._costs.observe(shape, rows, tokens, seconds)

    def remove(self, id: Hashable) -> None:
        """Harmless when the session isn't here."""
        if self._places.pop(id, None) is not None:
            self._trace.append(TraceLine(self._steps, "removed", (id,)))

    def next_step(self, now: float = -math.inf) -> list[Hashable]:
        """The sessions that run one step now, all of one shape; empty when there are none.

        `now` is on the clock of what is `due`. Each session is charged for the step; one whose last step this is leaves
        the scheduler.
        """
        by_share = sorted(self._places.values(), key=lambda p: (p.used, p.order))
        if not by_share:
            return []
        waiting = self._in_turn(by_share)
        urgent = self._urgent(waiting, now)
        if not urgent or self._urgent_calls >= _FAIR_EVERY - 1:
            waiting = by_share if urgent else waiting
            self._urgent_calls = 0
            self._level = max(self._level, waiting[0].used)
            # As many as leave the streams in time; one in any case, whose turn it is.
            chosen = self._filled(waiting, seconds=min(self._slack(place, now) for place in waiting))
        else:
            self._urgent_calls += 1
            others = [place for place in waiting if place not in urgent]
            chosen = self._filled([*urgent, *others], seconds=self._spare(urgent, now))
        for place in chosen:
            self._charge(place)
        self._steps += 1
        ids = [place.entry.id for place in chosen]
        self._trace.append(TraceLine(self._steps, "ran", tuple(ids)))
        return ids

    def _in_turn(self, by_share: Sequence[_Place]) -> list[_Place]:
        """Who goes first, of sessions that are sorted by the work they have had."""
        least = by_share[0].used

        def key(place: _Place) -> tuple[int, int, int, int]:
            turn = self._limits.turn_calls * _charge_of(place.entry)
            return int((place.used - least) // turn), -place.entry.priority, place.tokens_left, place.order

        return sorted(by_share, key=key)

    def _urgent(self, waiting: Sequence[_Place], now: float) -> list[_Place]:
        """Those that would be late after any other call, the earliest due first."""
        due = [place for place in waiting if place.entry.due is not None]
        if not due:
            return []
        # A call can't be interrupted, and the one after it may be another's that is as urgent.
        longest = 2 * max(self._alone(place) for place in waiting)
        return sorted(
            (place for place in due if self._slack(place, now) <= longest),
            key=lambda place: (place.entry.due.at, place.order) if place.entry.due else (math.inf, 0),
        )

    def _alone(self, place: _Place) -> float:
        """Seconds of a call with this session only."""
        entry = place.entry
        return self._costs.seconds(entry.shape, entry.rows, entry.tokens)

    def _slack(self, place: _Place, now: float) -> float:
        """How many seconds a session can wait and still be in time."""
        due = place.entry.due
        return math.inf if due is None else due.at - now - due.calls * self._alone(place)

    def _spare(self, urgent: Sequence[_Place], now: float) -> float:
        """How long the next call may take and leave all of them in time: the first runs in it, the others after it."""
        leader = self._slack(urgent[0], now) + self._alone(urgent[0])
        return min([leader, *(self._slack(place, now) for place in urgent[1:])])

    def _filled(self, order: Sequence[_Place], seconds: float = math.inf) -> list[_Place]:
        """The first, and of the others in this order those that fit beside it and into so many seconds."""
        shape = order[0].entry.shape
        rows = tokens = 0
        chosen: list[_Place] = []
        for place in order:
            entry = place.entry
            if entry.shape != shape:
                continue
            if rows + entry.rows > self._limits.max_rows or tokens + entry.tokens > self._limits.max_tokens:
                continue
            if chosen and math.isfinite(seconds):
                before = self._costs.seconds(shape, rows, tokens)
                after = self._costs.seconds(shape, rows + entry.rows, tokens + entry.tokens)
                if after > seconds and after - before > _WORTH_JOINING * self._alone(place):
                    continue
            rows += entry.rows
            tokens += entry.tokens
            chosen.append(place)
        return chosen

    def _charge(self, place: _Place) -> None:
        place.used += _charge_of(place.entry)
        place.remaining -= 1
        if place.entry.rows_left is not None:
            place.entry = replace(place.entry, rows_left=place.entry.rows_left - place.entry.rows)
        if place.remaining == 0:
            del self._places[place.entry.id]


def _charge_of(entry: Entry) -> float:
    """The work of one call, in tokens weighted by priority."""
    return entry.tokens / 2.0**entry.priority

"""What the step scheduler promises, over made-up traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.pipeline.scheduler import Due, Entry, Limits, StepScheduler

# Examples are the same in every run, and a busy machine fails none of them.
steady = settings(deadline=None, derandomize=True)

LIMITS = Limits(max_rows=4, max_tokens=400)
SHAPES = [(4, 1, 2, 2), (4, 9, 4, 4), (4, 9, 8, 8)]
TOKENS = dict(zip(SHAPES, [1, 36, 144], strict=True))


def entry(
    id: Hashable, *, shape: tuple[int, ...] = SHAPES[1], rows: int = 2, steps: int = 3, priority: int = 0
) -> Entry:
    return Entry(id, shape, rows, TOKENS[shape], steps, priority)


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    drawn = draw(
        st.lists(
            st.tuples(st.sampled_from(SHAPES), st.sampled_from([1, 2]), st.integers(1, 12), st.integers(-2, 2)),
            max_size=12,
        )
    )
    return [entry(i, shape=s, rows=r, steps=n, priority=p) for i, (s, r, n, p) in enumerate(drawn)]


def drain(scheduler: StepScheduler) -> list[list[Hashable]]:
    calls = []
    while call := scheduler.next_step():
        calls.append(call)
    return calls


@steady
@given(entries())
def test_every_call_is_of_one_shape_and_within_the_limits(drawn: list[Entry]) -> None:
    scheduler = StepScheduler(LIMITS)
    for e in drawn:
        scheduler.add(e)
    for call in drain(scheduler):
        rows = [drawn[id] for id in call]  # type: ignore[call-overload]  # ids are numbers here
        assert len(set(call)) == len(call)
        assert len({e.shape for e in rows}) == 1
        assert sum(e.rows for e in rows) <= LIMITS.max_rows
        assert sum(e.tokens for e in rows) <= LIMITS.max_tokens


@steady
@given(entries())
def test_every_session_runs_exactly_its_steps_and_leaves(drawn: list[Entry]) -> None:
    scheduler = StepScheduler(LIMITS)
    for e in drawn:
        scheduler.add(e)
    assert scheduler.outstanding_tokens == sum(e.tokens * e.steps for e in drawn)
    ran = Counter(id for call in drain(scheduler) for id in call)
    assert ran == {e.id: e.steps for e in drawn}
    assert len(scheduler) == 0
    assert scheduler.outstanding_tokens == 0


@steady
@given(entries(), st.data())
def test_nobody_starves_while_others_keep_coming(drawn: list[Entry], data: st.DataObject) -> None:
    """Whatever arrives and is cancelled meanwhile, a waiting session runs after bounded work of the others."""
    turn = data.draw(st.integers(1, 4), label="turn")
    scheduler = StepScheduler(replace(LIMITS, turn_calls=turn))
    patient = entry("patient", shape=SHAPES[2], rows=2, steps=1000, priority=-2)
    scheduler.add(patient)
    # Once every other session has had as much work as a turn of the patient one costs it, it is its turn.
    heaviest = patient.tokens / 2.0**patient.priority
    lightest = 1 / 2.0**2
    waited, here = 0, 0
    for number in range(100):
        if drawn and data.draw(st.booleans(), label="arrives"):
            e = drawn[number % len(drawn)]
            scheduler.add(Entry((number, e.id), e.shape, e.rows, e.tokens_per_row, e.steps, e.priority))
            here += 1
        waited = 0 if "patient" in scheduler.next_step() else waited + 1
        assert waited <= (here + 1) * (turn * heaviest / lightest + 1)
    assert "patient" in {id for _ in range(5000) for id in scheduler.next_step()}


@pytest.mark.parametrize("turn", [1, 8, 64])
def test_short_ones_that_never_end_leave_a_long_one_its_share(turn: int) -> None:
    """One of them always has less left to do; and yet almost half of the work is the long one's."""
    scheduler = StepScheduler(Limits(max_rows=2, max_tokens=400, turn_calls=turn))
    scheduler.add(entry("long", rows=2, steps=10**6))
    ran: Counter[bool] = Counter()
    for number in range(400):
        scheduler.add(entry(number, rows=2, steps=5))
        while number in scheduler._places:
            ran.update(id == "long" for id in scheduler.next_step())
    assert ran[True] >= 0.75 * (ran[False] - turn)


@steady
@given(st.integers(1, 10), st.integers(2, 8))
def test_equals_of_one_shape_take_turns(count: int, rows: int) -> None:
    turn = 4
    scheduler = StepScheduler(Limits(max_rows=rows, max_tokens=10_000, turn_calls=turn))
    for id in range(count):
        scheduler.add(entry(id, steps=1000))
    ran: Counter[Hashable] = Counter(dict.fromkeys(range(count), 0))
    for _ in range(100):
        ran.update(scheduler.next_step())
        assert max(ran.values()) - min(ran.values()) <= turn
    assert len(set(ran)) == count


def test_equal_videos_end_one_after_another() -> None:
    """In step all four would end with the last call."""
    scheduler = StepScheduler(Limits(max_rows=2, max_tokens=400))
    for id in range(4):
        scheduler.add(entry(id, rows=1, steps=20))
    ended = [id for call in drain(scheduler) for id in call]
    assert [ended[::-1].index(id) // 2 for id in range(4)] == [20, 20, 0, 0]


def test_what_is_watched_goes_before_what_is_not() -> None:
    scheduler = StepScheduler(Limits(max_rows=2, max_tokens=400))
    scheduler.add(entry("batch", rows=2, steps=3))
    scheduler.add(entry("watched", rows=2, steps=20, priority=2))
    assert drain(scheduler) == [["watched"]] * 20 + [["batch"]] * 3


def test_shapes_share_the_engine_by_work_not_by_calls() -> None:
    """A preview's steps all fit in between two steps of a long video, and the long video still runs."""
    scheduler = StepScheduler(LIMITS)
    scheduler.add(entry("long", shape=SHAPES[2], steps=50))
    assert scheduler.next_step() == ["long"]
    scheduler.add(entry("preview", shape=SHAPES[0], steps=20))
    calls = [scheduler.next_step() for _ in range(21)]
    assert calls == [["preview"]] * 20 + [["long"]]


def test_a_priority_level_doubles_the_share() -> None:
    scheduler = StepScheduler(Limits(max_rows=2, max_tokens=400, turn_calls=1))
    scheduler.add(entry("usual", steps=1000))
    scheduler.add(entry("urgent", steps=1000, priority=1))
    ran = Counter(id for _ in range(300) for id in scheduler.next_step())
    assert ran["urgent"] == pytest.approx(2 * ran["usual"], abs=2)


def test_a_removed_session_does_not_run_again() -> None:
    scheduler = StepScheduler(LIMITS)
    scheduler.add(entry("a"))
    scheduler.add(entry("b"))
    assert scheduler.next_step() == ["a", "b"]
    scheduler.remove("a")
    scheduler.remove("never seen")
    assert drain(scheduler) == [["b"], ["b"]]


def test_one_row_sessions_fill_what_two_row_sessions_leave() -> None:
    scheduler = StepScheduler(Limits(max_rows=3, max_tokens=400))
    scheduler.add(entry("two", rows=2))
    scheduler.add(entry("two more", rows=2))
    scheduler.add(entry("one", rows=1))
    assert drain(scheduler) == [["one", "two"]] * 3 + [["two more"]] * 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("x", rows=5), "over the denoiser's limit of 4 rows"),
        (Entry("x", SHAPES[2], 2, 201, 3), "and 400 tokens a call"),
        (entry("x", steps=0), "nothing to run"),
        (entry("here"), "already scheduled"),
    ],
)
def test_what_can_never_run_is_refused(bad: Entry, message: str) -> None:
    scheduler = StepScheduler(LIMITS)
    scheduler.add(entry("here"))
    with pytest.raises(ValueError, match=message):
        scheduler.add(bad)


def test_limits_that_no_guided_video_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_rows"):
        Limits(max_rows=1)


def test_work_that_is_left_counts_the_rows_of_every_step() -> None:
    """Those of the next step alone would say twice as much, or half, at every second one."""
    scheduler = StepScheduler(LIMITS)
    scheduler.add(replace(entry("a", rows=2, steps=4), rows_left=6))
    left = [scheduler.outstanding_tokens]
    for rows in (1, 2, 1, 2):
        scheduler.next_step()
        scheduler.reshape("a", SHAPES[1], TOKENS[SHAPES[1]], rows=rows)
        left.append(scheduler.outstanding_tokens)
    assert left == [rows * TOKENS[SHAPES[1]] for rows in (6, 4, 3, 1, 0)]


def test_of_equals_the_one_with_the_fewest_rows_left_goes_first() -> None:
    scheduler = StepScheduler(Limits(max_rows=2))
    scheduler.add(replace(entry("all", rows=2, steps=4), rows_left=8))
    scheduler.add(replace(entry("half", rows=2, steps=4), rows_left=5))
    assert scheduler.next_step() == ["half"]


def test_a_session_that_became_smaller_shares_calls_with_its_new_shape() -> None:
    scheduler = StepScheduler(LIMITS)
    scheduler.add(entry("a", shape=SHAPES[1], steps=2))
    assert scheduler.next_step() == ["a"]
    scheduler.add(entry("b", shape=SHAPES[0], steps=1))
    scheduler.reshape("a", SHAPES[0], TOKENS[SHAPES[0]], rows=2)
    assert scheduler.outstanding_tokens == 2 * 2 * TOKENS[SHAPES[0]]
    assert sorted(scheduler.next_step()) == ["a", "b"]
    assert not scheduler.next_step()
    scheduler.reshape("a", SHAPES[1], TOKENS[SHAPES[1]], rows=2)
    assert len(scheduler) == 0


@dataclass
class Stream:
    """A viewer of one video, whose next chunk is always due `period` after the one before; it takes `calls` calls."""

    id: Hashable
    entry: Entry
    period: float
    calls: int
    next_due: float
    left: int = 0
    late: int = 0

    def __post_init__(self) -> None:
        self.left = self.calls

    @property
    def due(self) -> Due:
        return Due(self.next_due, self.left)

    def ran(self, now: float) -> None:
        self.left -= 1
        if self.left == 0:
            self.late += now > self.next_due + 1e-9
            self.next_due += self.period
            self.left = self.calls


def play(streams: list[Stream], batch: list[Entry], until: float, *, per_call: float = 0.0) -> tuple[float, int]:
    """Run an engine that takes a second for each thousand tokens and `per_call` for a call; the time that the batch
    had, and how many calls it was in."""
    scheduler, now, batched, calls = StepScheduler(Limits(max_rows=8, max_tokens=10_000)), 0.0, 0.0, 0
    by_id = {stream.id: stream for stream in streams}
    entries = {entry.id: entry for entry in batch} | {stream.id: stream.entry for stream in streams}
    # What calls take is known from earlier ones.
    for e in entries.values():
        scheduler.took(e.shape, e.rows, e.tokens, per_call + e.tokens / 1000)
        scheduler.add(replace(e, due=by_id[e.id].due) if e.id in by_id else e)
    while now < until:
        ids = scheduler.next_step(now)
        called = [entries[id] for id in ids]
        tokens = sum(e.tokens for e in called)
        seconds = per_call + tokens / 1000
        scheduler.took(called[0].shape, sum(e.rows for e in called), tokens, seconds)
        now += seconds
        if any(id not in by_id for id in ids):
            batched, calls = batched + seconds, calls + 1
        for id in ids:
            if id in by_id:
                by_id[id].ran(now)
                entry = entries[id]
                scheduler.reshape(id, entry.shape, entry.tokens_per_row, rows=entry.rows, due=by_id[id].due)
    return batched, calls


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Stream], list[Entry]]:
    """Streams that take at most 70 % of the engine, and batch jobs of any shape, of calls that are short beside a
    chunk's time."""
    streams, share = [], 0.0
    for number in range(draw(st.integers(1, 5))):
        calls, rows = draw(st.integers(1, 5)), draw(st.integers(1, 2))
        work = calls * rows * TOKENS[SHAPES[1]] / 1000
        period = work / draw(st.floats(0.05, 0.7))
        if period < 2.5 or share + work / period > 0.7:
            continue
        share += work / period
        e = replace(entry(("stream", number), rows=rows, steps=10**6), priority=2)
        streams.append(Stream(e.id, e, period, calls, next_due=period))
    batch = [
        replace(entry(("batch", number), shape=shape, rows=2, steps=10**6), priority=0)
        for number, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), max_size=4)))
    ]
    return streams, batch


@steady
@given(loads())
def test_streams_are_in_time_whenever_they_can_be(load: tuple[list[Stream], list[Entry]]) -> None:
    streams, batch = load
    if streams or batch:
        play(streams, batch, until=30.0)
    assert [stream.late for stream in streams] == [0] * len(streams)


@steady
@given(st.integers(1, 6))
def test_streams_that_are_too_many_do_not_stop_the_rest(count: int) -> None:
    streams = []
    for number in range(count):
        e = replace(entry(("stream", number), rows=2, steps=10**6), priority=2)
        streams.append(Stream(e.id, e, period=0.05, calls=1, next_due=0.05))
    batch = replace(entry("batch", shape=SHAPES[2], rows=1, steps=10**6), priority=0)
    _, calls = play(streams, [batch], until=15.0)
    assert calls >= 3


def test_a_batch_gets_all_that_a_stream_leaves() -> None:
    e = replace(entry("stream", rows=2, steps=10**6), priority=2)
    stream = Stream(e.id, e, period=1.0, calls=4, next_due=1.0)  # 0.288 s of work a second
    batch = replace(entry("batch", shape=SHAPES[2], rows=1, steps=10**6), priority=0)
    batched, _ = play([stream], [batch], until=100.0)
    assert stream.late == 0
    # Beside a stream that keeps ahead of its viewer by its larger share, not only by what is due.
    assert batched >= 19


def test_a_stream_in_a_hurry_takes_nobody_along_who_would_make_it_late() -> None:
    scheduler = StepScheduler(LIMITS)
    scheduler.took(SHAPES[1], 1, 36, 0.1)
    scheduler.took(SHAPES[1], 2, 72, 0.2)
    scheduler.add(replace(entry("stream", rows=1, steps=9), due=Due(10.25, 2)))
    scheduler.add(entry("batch", rows=1, steps=9))
    assert scheduler.next_step(now=10.0) == ["stream"]


def test_rows_that_are_cheaper_together_go_together() -> None:
    scheduler = StepScheduler(LIMITS)
    scheduler.took(SHAPES[1], 1, 36, 0.1)
    scheduler.took(SHAPES[1], 2, 72, 0.11)
    scheduler.add(replace(entry("stream", rows=1, steps=9), due=Due(10.2, 2)))
    scheduler.add(entry("batch", rows=1, steps=9))
    assert scheduler.next_step(now=10.0) == ["stream", "batch"]


def test_the_earliest_due_of_two_goes_first() -> None:
    scheduler = StepScheduler(Limits(max_rows=2, max_tokens=400))
    scheduler.took(SHAPES[1], 2, 72, 0.1)
    scheduler.add(replace(entry("later", rows=2, steps=9), due=Due(10.3, 1)))
    scheduler.add(replace(entry("sooner", rows=2, steps=9), due=Due(10.2, 1)))
    assert [scheduler.next_step(now=10.0), scheduler.next_step(now=10.1)] == [["sooner"], ["sooner"]]
    scheduler.reshape("sooner", SHAPES[1], 36, rows=2, due=Due(11.2, 1))
    assert scheduler.next_step(now=10.2) == ["later"]

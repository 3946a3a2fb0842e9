"""Who goes next where there isn't room for all, over made-up arrivals; and a thread that is shared like that."""

from __future__ import annotations

import asyncio
import itertools
import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.pipeline.turns import Turns, most_of_others
from serving.pipeline.worker import Worker

# Examples are the same in every run, and a busy machine fails none of them.
steady = settings(deadline=None, derandomize=True)

# True: an interactive one comes; False: another; None: whose turn it is goes.
histories = st.lists(st.sampled_from([True, False, None]), max_size=60)


@dataclass(frozen=True)
class Turn:
    """Who had it, and who else was waiting, in the order of their coming."""

    who: int
    interactive: bool
    waiting: list[tuple[int, bool]]


def played(history: list[bool | None]) -> list[Turn]:
    """The turns of those who come, numbered in their order, until nobody is left."""
    turns: Turns[int] = Turns()
    waiting: dict[int, bool] = {}
    had = []
    for number, event in enumerate([*history, *[None] * len(history)]):
        if event is not None:
            waiting[number] = event
            turns.wait(number, interactive=event)
        else:
            first = turns.first()
            who = turns.take()
            assert who == first
            if who is not None:
                interactive = waiting.pop(who)
                had.append(Turn(who, interactive, list(waiting.items())))
        assert len(turns) == len(waiting)
    return had


@steady
@given(histories)
def test_everybody_has_one_turn_in_the_order_of_their_kind(history: list[bool | None]) -> None:
    had = played(history)
    for kind in (True, False):
        came = [number for number, event in enumerate(history) if event is kind]
        assert [turn.who for turn in had if turn.interactive is kind] == came


@steady
@given(histories)
def test_the_interactive_wait_for_others_once_in_eight_turns_at_most(history: list[bool | None]) -> None:
    had = played(history)
    unfair = [
        n for n, turn in enumerate(had) if not turn.interactive and any(interactive for _, interactive in turn.waiting)
    ]
    assert all(later - earlier >= 8 for earlier, later in itertools.pairwise(unfair))
    # And only for somebody who has waited longer than anyone.
    assert all(had[n].who < min(number for number, _ in had[n].waiting) for n in unfair)


@steady
@given(st.lists(st.booleans(), max_size=12))
def test_nobody_waits_for_ever_however_many_come_to_watch(before: list[bool]) -> None:
    turns: Turns[int] = Turns()
    for number, interactive in enumerate(before):
        turns.wait(number, interactive=interactive)
    turns.wait(-1, interactive=False)
    for number in range(100, 100 + 8 * (len(before) + 1)):
        turns.wait(number, interactive=True)
        if turns.take() == -1:
            return
    pytest.fail("it never had its turn")


@steady
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20))
def test_who_leaves_leaves_nothing_behind(came: list[tuple[bool, bool]]) -> None:
    """Turns go as if those who left had never come."""
    some, all_of_them = Turns[int](), Turns[int]()
    for number, (interactive, stays) in enumerate(came):
        all_of_them.wait(number, interactive=interactive)
        if stays:
            some.wait(number, interactive=interactive)
    for number, (_, stays) in enumerate(came):
        if not stays:
            all_of_them.leave(number)
            all_of_them.leave(number)
    assert [all_of_them.take() for _ in came] == [some.take() for _ in came]
    assert len(all_of_them) == 0


def test_where_the_others_have_enough_only_the_interactive_go() -> None:
    turns: Turns[str] = Turns()
    turns.wait("batch", interactive=False)
    assert turns.take(interactive_only=True) is None
    for number in range(20):  # nor when it would be the turn of the longest waiting
        turns.wait(f"stream {number}", interactive=True)
        assert turns.take(interactive_only=True) == f"stream {number}"
    assert turns.take() == "batch"


def test_nobody_waits_twice() -> None:
    turns: Turns[str] = Turns()
    turns.wait("a", interactive=True)
    with pytest.raises(ValueError, match="waiting already"):
        turns.wait("a", interactive=False)


@pytest.mark.parametrize(("places", "others"), [(1, 1), (2, 1), (3, 2), (16, 10)])
def test_somebody_who_comes_to_watch_finds_places_free(places: int, others: int) -> None:
    assert most_of_others(places) == others


@pytest.mark.asyncio
async def test_a_thread_takes_whose_turn_it_is_and_nothing_that_was_cancelled() -> None:
    worker, gate, began, ran = Worker("test"), threading.Event(), asyncio.Event(), list[str]()
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.call_soon_threadsafe(began.set)
        gate.wait()
        ran.append("first")

    def call(name: str, interactive: bool) -> asyncio.Task[None]:
        return loop.create_task(worker.run(lambda: ran.append(name), interactive=interactive))

    cut_short = loop.create_task(worker.run(first, interactive=False))
    await began.wait()
    calls = [call(name, name.startswith("stream")) for name in ("batch 1", "gone", "batch 2", "stream", "stream gone")]
    await asyncio.sleep(0)  # all of them wait
    calls[1].cancel()
    calls[4].cancel()
    # The call goes on without whoever asked for it, and the next waits for its end.
    cut_short.cancel()
    await asyncio.gather(cut_short, calls[1], calls[4], return_exceptions=True)
    assert not ran
    gate.set()
    await asyncio.gather(*(calls[n] for n in (0, 2, 3)))
    assert ran == ["first", "stream", "batch 1", "batch 2"]
    assert await worker.run(lambda: 7, interactive=True) == 7
    await worker.stop()


@pytest.mark.asyncio
async def test_a_call_that_is_cancelled_at_any_moment_passes_its_turn_on() -> None:
    worker, loop = Worker("test"), asyncio.get_running_loop()
    for moment in range(200):
        before, cut_short, after = (loop.create_task(worker.run(lambda: 7, interactive=True)) for _ in range(3))
        for _ in range(moment % 20):
            await asyncio.sleep(0)
        cut_short.cancel()
        assert await asyncio.wait_for(asyncio.gather(before, after), timeout=30) == [7, 7]
    await worker.stop()


@pytest.mark.asyncio
async def test_what_a_call_raises_comes_out_and_a_stopped_thread_takes_nothing() -> None:
    worker = Worker("test")
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 // 0, interactive=False)
    await worker.stop()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            await worker.run(lambda: 7, interactive=True)

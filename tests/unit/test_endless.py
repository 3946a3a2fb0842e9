"""An endless video: what its session asks of the engine, and how far it may go; engine and clock are made up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from test_sessions import MANIFEST, outputs, request, text

from serving.engines.engine import HOST, Array
from serving.jobs.checkpoint import Checkpoint
from serving.pipeline.endless import EndlessSession
from serving.pipeline.interactive import _Playback
from serving.pipeline.sessions import open_session
from serving.pipeline.stages import Fragment, LatentChunk, Steering


def endless(chunks: int, number: int = 0) -> EndlessSession:
    asked = request(seconds=1, guidance_scale=2)
    return EndlessSession(MANIFEST, replace(asked, steering=Steering(chunks, number)), HOST)


def calls(session: EndlessSession) -> Iterator[tuple[dict[str, Array], list[LatentChunk]]]:
    """All that it may do, which `calls` says a chunk at a time."""
    while session.calls_done < session.calls:
        feeds = {name: array.copy() for name, array in session.feeds().items()}
        yield feeds, [event for event in session.take(outputs(feeds)) if isinstance(event, LatentChunk)]


def test_it_asks_what_a_long_video_asks() -> None:
    long = open_session(MANIFEST, request(seconds=9, guidance_scale=2))
    session = endless(12)
    for feeds, _ in calls(session):
        for name, array in long.feeds().items():
            np.testing.assert_array_equal(feeds[name], array)
        long.take(outputs(long.feeds()))
    # Twelve chunks of two steps and a clean pass; and it stops there, in front of the next one.
    assert session.calls_done == session.calls == 12 * 3


def test_it_stops_at_the_end_of_a_chunk_and_goes_on_when_it_may() -> None:
    session = endless(1)
    assert [chunk.index for _, made in calls(session) for chunk in made] == [0]
    session.steer(Steering(3))
    next(calls(session))
    session.steer(Steering(0))  # a chunk that is begun is finished
    assert [chunk.index for _, made in calls(session) for chunk in made] == [1]
    session.steer(Steering(3))
    assert [chunk.index for _, made in calls(session) for chunk in made] == [2]


def test_the_rows_that_are_left_are_those_up_to_the_end_of_its_chunk() -> None:
    session, left = endless(1), []
    while session.calls_done < session.calls:
        left.append(session.rows_left)
        session.take(outputs(session.feeds()))
    # Two guided steps, and the pass that moves the cache on.
    assert left == [6, 4, 2]
    assert session.rows_left == 0
    session.steer(Steering(3))
    assert session.rows_left == 6


def test_a_prompt_holds_from_the_next_chunk_on_that_is_begun() -> None:
    session = endless(2)
    made = calls(session)
    next(made)
    session.steer(Steering(2, 5, text(3)))
    session.steer(Steering(3, 5))  # the same prompt, said again without its embedding
    rest = list(made)
    prompts = [float(feeds["encoder_hidden_states"][0, 0, 0]) for feeds, _ in rest]
    assert prompts == [1, 1, 3, 3, 3, 3, 3, 3]
    assert all(float(feeds["encoder_hidden_states"][1, 0, 0]) == -1 for feeds, _ in rest)
    assert [(chunk.index, chunk.prompt) for _, shown in rest for chunk in shown] == [(0, 0), (1, 5), (2, 5)]


def test_one_that_is_begun_again_remembers_what_the_window_did() -> None:
    whole = endless(7)
    made = [chunk for _, shown in calls(whole) for chunk in shown]
    # One sink, two chunks of window: what chunk 7 sees is 0, 5 and 6.
    begun = Checkpoint(chunks=tuple(made[n].latents for n in (0, 5, 6)))
    asked = replace(request(seconds=1, guidance_scale=2), steering=Steering(7), begun=begun, chunks_before=7)
    again = EndlessSession(MANIFEST, asked, HOST)
    assert [shown for _, shown in calls(again)] == [[], [], []]
    for session in (whole, again):
        session.steer(Steering(8))
    before, after = next(calls(whole))[0], next(calls(again))[0]
    np.testing.assert_array_equal(after["latents"], before["latents"])  # the noise is chunk 7's
    # Its place in the ring is another, and the ring is as full: two of window and one sink.
    assert int(after["write_index"][0]) == 3
    assert (after["cache"] != 0).all()
    assert [chunk.index for _, shown in calls(again) for chunk in shown] == [7]


def test_only_a_causal_model_goes_on_endlessly() -> None:
    still = MANIFEST.model_copy(update={"rollout": "bidirectional"})
    with pytest.raises(ValueError, match="bidirectional"):
        EndlessSession(still, replace(request(), steering=Steering(1)), HOST)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def shown(playback: _Playback, *indexes: int) -> None:
    # Chunks of 9, 12, 12 … frames at 16 a second begin at 0, 0.5625, 1.3125, 2.0625 … s.
    for index in indexes:
        first = 0 if index == 0 else 9 + 12 * (index - 1)
        playback.out(Fragment(index, 12 if index else 9, first, b"", b""))


def test_it_is_made_so_far_ahead_of_the_clock_and_of_the_player(clock: Clock) -> None:
    playback = _Playback(MANIFEST, 1.0, clock)
    assert playback.chunks(0) == 2
    assert playback.seconds_to_next_chunk() is None  # nothing plays yet
    shown(playback, 0, 1)
    clock.now += 0.5
    assert playback.chunks(2) == 2  # nobody has acknowledged anything
    assert playback.seconds_to_next_chunk() is None
    playback.acknowledge(1)
    assert playback.chunks(2) == 3
    assert playback.seconds_to_next_chunk() == pytest.approx(2.0625 - 1.5)
    clock.now += 10  # playback stands still at the end of what there is
    assert playback.chunks(2) == 4
    assert playback.seconds_to_next_chunk() is None


def test_playback_stands_still_while_it_is_paused(clock: Clock) -> None:
    playback = _Playback(MANIFEST, 1.0, clock)
    shown(playback, 0, 1, 2, 3)
    playback.acknowledge(3)
    playback.pause()
    clock.now += 10
    assert (playback.chunks(4), playback.seconds_to_next_chunk()) == (4, None)
    playback.resume()
    assert playback.chunks(1) == 2
    clock.now += 1
    assert playback.chunks(1) == 3
    for index in (-1, 4):
        with pytest.raises(ValueError, match="was not sent"):
            playback.acknowledge(index)

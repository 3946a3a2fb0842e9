"""What is remembered, against a plain list of chunks that forgets."""

from __future__ import annotations

import pytest

from models.window import ContextWindow

WINDOWS = [ContextWindow(3, sinks, window) for sinks in (0, 1, 2, 3) for window in (1, 2, 3, 5)]


@pytest.mark.parametrize("window", WINDOWS)
def test_the_slots_hold_what_is_remembered(window: ContextWindow) -> None:
    slots: dict[int, int] = {}
    for chunk in range(4 * window.capacity):
        assert sorted(slots.values()) == window.remembered(chunk)
        slots[window.slot(chunk)] = chunk
        assert max(slots) < window.capacity


@pytest.mark.parametrize("window", WINDOWS)
def test_the_first_and_the_latest_are_remembered(window: ContextWindow) -> None:
    for chunk in range(4 * window.capacity):
        seen = list(range(chunk))
        if len(seen) > window.capacity:
            seen = seen[: window.sink_chunks] + seen[-window.window_chunks :]
        assert window.remembered(chunk) == seen


def test_a_slot_is_as_long_as_a_chunk() -> None:
    window = ContextWindow(chunk_frames=3, sink_chunks=1, window_chunks=3)
    assert [window.frames_of(chunk) for chunk in (0, 3, 4)] == [slice(0, 3), slice(9, 12), slice(3, 6)]
    assert (window.capacity, window.cached_frames) == (4, 12)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window_chunks must be at least 1"):
        ContextWindow(window_chunks=0)

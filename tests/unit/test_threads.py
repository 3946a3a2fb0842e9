"""Threads in the background, and whom they give way to."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from serving import threads


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_threads_in_the_background_are_nicer_than_their_process_once_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "_giving_way", threading.Event())
    before = niceness()
    with threads.background_pool(1, "early") as pool:
        assert pool.submit(niceness).result() == before
    threads.give_way()
    with threads.background_pool(1, "late") as pool:
        assert pool.submit(niceness).result() == threads.NICENESS
        assert pool.submit(lambda: threading.current_thread().name).result() == "late_0"
    assert niceness() == before

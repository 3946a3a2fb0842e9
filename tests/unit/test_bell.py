"""A bell is heard by whoever waits, wherever it is rung, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading

from serving.jobs.bell import Bell

AGES = 3600.0


async def test_all_who_wait_hear_it_and_nobody_else_does() -> None:
    bell = Bell()
    ours = [asyncio.create_task(bell.wait("ours", AGES)) for _ in range(3)]
    other = asyncio.create_task(bell.wait("other", AGES))
    await asyncio.sleep(0)
    bell.ring("ours")
    await asyncio.gather(*ours)
    assert not other.done()
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    assert not bell._waiting


async def test_it_may_be_rung_in_another_thread() -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait(1, AGES))
    await asyncio.sleep(0)
    threading.Thread(target=bell.ring, args=(1,)).start()
    await waiting


async def test_nobody_waits_for_ever() -> None:
    bell = Bell()
    bell.ring("nobody waits")
    await bell.wait("nobody rings", 0.001)
    assert not bell._waiting


def test_a_loop_that_is_gone_is_not_rung() -> None:
    bell = Bell()
    waiting: list[asyncio.Task[None]] = []

    async def leave() -> None:
        waiting.append(asyncio.create_task(bell.wait("it", AGES)))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    bell.ring("it")
    assert not waiting[0].done()

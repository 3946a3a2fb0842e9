"""Many readers of one video: fast, slow, stalled, coming and going; and none costs the others anything.

`RUSHES_STALL_SECONDS` says how long some of them read nothing at all.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from making import Making, queued
from service import Service

from models.bundle import Bundle
from serving.client import AsyncRushes
from serving.client.wire import FragmentReader

STALL_SECONDS = float(os.environ.get("RUSHES_STALL_SECONDS", "2"))
FRAGMENTS, FRAGMENT_BYTES = 24, 1 << 20
MOST_GROWTH_BYTES = 30 << 20
STALLED, COMING_AND_GOING, STEADY = 5, 10, 5
_SEED = 7

pytestmark = pytest.mark.timeout(240 + 2 * STALL_SECONDS)


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def fragment(index: int) -> bytes:
    """Nothing to see, but with what counts: its number, and more bytes than any buffer on the way would hold."""
    moof = box(b"moof", box(b"mfhd", struct.pack(">II", 0, index + 1)))
    return moof + box(b"mdat", random.Random(index).randbytes(FRAGMENT_BYTES))


INIT = box(b"ftyp", b"iso6") + box(b"moov", b"")


class Alone:
    """A service in another process, whose memory is nobody else's."""

    def __init__(self, bundle: Bundle, data_dir: Path) -> None:
        program = str(Path(__file__).parents[1] / "serve_alone.py")
        self._process = subprocess.Popen(
            [sys.executable, program, str(bundle.root), str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
async def alone(tiny_bundle: Bundle, tmp_path: Path) -> AsyncIterator[Alone]:
    started = await asyncio.to_thread(Alone, tiny_bundle, tmp_path)
    yield started
    await asyncio.to_thread(started.stop)


class Digest:
    """What a reader has seen, told from its hash; each chunk must be the next one."""

    def __init__(self) -> None:
        self.next_index, self._hash = 0, sha256()

    def add(self, index: int, data: bytes) -> None:
        assert index == self.next_index
        self.next_index += 1
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


async def steady(url: str, video_id: str, pause_seconds: float) -> str:
    seen = Digest()
    async with AsyncRushes(url) as rushes:
        async for chunk in rushes.watch(video_id):
            seen.add(chunk.index, chunk.data)
            await asyncio.sleep(pause_seconds)
    return seen.hexdigest()


async def stalled(url: str, video_id: str, begun: asyncio.Event, go_on: asyncio.Event) -> str:
    """Reads the beginning, then nothing for a while, then the rest; over one connection."""
    seen, reader = Digest(), FragmentReader()
    async with (
        httpx.AsyncClient(base_url=url, timeout=None) as client,
        client.stream("GET", f"/v1/videos/{video_id}/stream") as answer,
    ):
        async for piece in answer.aiter_raw():
            for chunk in reader.feed(piece):
                seen.add(chunk.index, chunk.data)
            if seen.next_index == 1:
                begun.set()
                await go_on.wait()
    return seen.hexdigest()


async def coming_and_going(url: str, video_id: str, chance: random.Random) -> str:
    """Leaves after as many bytes as it happens, in the middle of a fragment too, and comes back for the rest."""
    seen, reader = Digest(), FragmentReader()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while seen.next_index < FRAGMENTS:
            left = chance.randrange(FRAGMENT_BYTES // 2, 8 * FRAGMENT_BYTES)
            params = {"from_fragment": reader.next_index}
            async with client.stream("GET", f"/v1/videos/{video_id}/stream", params=params) as answer:
                reader.reconnected()
                async for piece in answer.aiter_raw():
                    for chunk in reader.feed(piece):
                        seen.add(chunk.index, chunk.data)
                    left -= len(piece)
                    if left <= 0:
                        break
    return seen.hexdigest()


async def test_twenty_readers_see_the_same_and_the_stalled_ones_take_no_memory(
    alone: Alone, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    service = Service(tiny_bundle, tmp_path)
    async with httpx.AsyncClient(base_url=alone.url) as client:
        making = await Making.begun(service, await queued(client))
    expected = Digest()
    for index in range(FRAGMENTS):
        expected.add(index, fragment(index))

    async def write(indexes: range) -> None:
        for index in indexes:
            await making.writer.append(index, 12 * index, 12, INIT, fragment(index))

    url, id, go_on = alone.url, making.id, asyncio.Event()
    begun = [asyncio.Event() for _ in range(STALLED)]
    stalling = [asyncio.create_task(stalled(url, id, event, go_on)) for event in begun]
    others = [asyncio.create_task(coming_and_going(url, id, random.Random(_SEED + n))) for n in range(COMING_AND_GOING)]
    others += [asyncio.create_task(steady(url, id, 0.002 * 3**n)) for n in range(STEADY)]
    await write(range(1))
    for event in begun:
        await event.wait()
    before = most = alone.resident_bytes()

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, alone.resident_bytes())
            await asyncio.sleep(0.02)

    looking = asyncio.create_task(look())
    # All of it is there for them to be sent, several times what the service may hold.
    await asyncio.gather(write(range(1, FRAGMENTS)), asyncio.sleep(STALL_SECONDS))
    await making.writer.close()
    await service.store.complete(making.id, making.video.fence)
    seen = await asyncio.gather(*others)
    looking.cancel()
    print(f"grew by {(most - before) / 2**20:.1f} MiB while {STALLED} stalled for {STALL_SECONDS:g} s and more")
    assert most - before < MOST_GROWTH_BYTES
    go_on.set()
    seen += await asyncio.gather(*stalling)
    assert set(seen) == {expected.hexdigest()}
    assert len(seen) == 20

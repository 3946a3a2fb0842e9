"""The append-only record of a video's init segment and fragments: what is in it is visible, what is not isn't.

A directory a video:

    init.mp4        the init segment
    00000000.m4s …  the fragments
    index.jsonl     a line for each fragment, in order, and a last line that says how the log ended
    fence           the newest attempt's fence; locked while anything here is written
    origin          a name for all that the fragments are made from

A fragment's file is whole and on disk before its line is written, so a line can be trusted, and a crash leaves at most
a file without a line, a temporary file, or half a line at the very end: the next writer clears them away, readers never
see them.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from serving.jobs.bell import Bell
from serving.jobs.video import StaleFence, is_video_id

# Readers look at the index's size. A `stat` takes some two microseconds, works across processes and containers that
# share a directory, and needs no descriptor a reader (inotify has limits on both): at the longest pause a reader
# costs 25 wake-ups a second and sees a fragment within 40 ms. One in the writer's own process is told at once.
_SHORTEST_PAUSE_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 0.04
_ASK_END_SECONDS = 1.0
# A reader that starts late on a long log takes the index in pieces of this size.
_INDEX_BLOCK_BYTES = 1 << 16
# A line must fit in a block.
_LONGEST_MESSAGE = 2000


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of the index: fragment `index` holds `frames` frames from `first_frame` on, in `size_bytes` bytes."""

    index: int
    first_frame: int
    frames: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LogEnd:
    """The last line of the index; both fields are None when the video is whole."""

    error_code: str | None = None
    error_message: str | None = None


_grown = Bell()

# Whether a video has ended as far as somebody else (the store) knows, and how.
AskEnd = Callable[[], Awaitable[LogEnd | None]]


class LogError(RuntimeError):
    """A write that would make the log wrong: out of order, other bytes than before, or after its end."""


class LogFailed(RuntimeError):  # noqa: N818 - it is the video that failed
    """The video failed: the fragments before this are all there will be."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class FragmentLog:
    """The readers' side. Any number may read, from any process, at their own pace, before or while it is written."""

    def __init__(self, root: Path, video_id: str) -> None:
        """The log of `video_id` under `root`. Raises `ValueError` for anything but a video id."""
        if not is_video_id(video_id):
            raise ValueError(f"not a video id: {video_id!r}")
        self.video_id = video_id
        self.path = root / video_id

    @classmethod
    def open(cls, root: Path, video_id: str) -> FragmentLog:
        """For reading. It need not be there yet: it reads as empty, and `follow` waits for it."""
        return cls(root, video_id)

    @classmethod
    async def create(cls, root: Path, video_id: str, *, fence: int, origin: str | None = None) -> LogWriter:
        """For writing as the attempt with this fence, whether the log is new or an earlier attempt left it.

        From here on, older fences can't write. Raises `StaleFence` when a newer one was here already. `origin` names
        all that the bytes are made from; raises `LogError` when there are fragments of another origin already, which
        the rest would not go with.
        """
        writer = LogWriter(cls(root, video_id), fence, origin)
        await asyncio.to_thread(writer._take_over)
        return writer

    def entries(self) -> list[LogEntry]:
        """What is in the log now."""
        return [line for line in _Index(self.path).read_to_end() if isinstance(line, LogEntry)]

    def end(self) -> LogEnd | None:
        """How the log ended, or None when it may still grow."""
        index = _Index(self.path)
        for line in index.read_to_end():
            if isinstance(line, LogEnd):
                return line
        return None

    def origin(self) -> str | None:
        """What the fragments are made from, as whoever began the log has named it."""
        try:
            return (self.path / "origin").read_text()
        except FileNotFoundError:
            return None

    def init(self) -> bytes:
        """The init segment. Raises `FileNotFoundError` before the first fragment is there."""
        return self._init_path.read_bytes()

    def fragment(self, index: int) -> bytes:
        """Fragment `index`, which must be in the log."""
        return self._fragment_path(index).read_bytes()

    def opened(self, index: int) -> BinaryIO:
        """Fragment `index` as a file."""
        return open(self._fragment_path(index), "rb")

    def fragments(self) -> Iterator[bytes]:
        """The fragments that are in the log now, read one at a time."""
        return (self.fragment(entry.index) for entry in self.entries())

    async def follow(self, from_fragment: int = 0, *, ask_end: AskEnd | None = None) -> AsyncGenerator[bytes, None]:
        """The init segment, then fragment `from_fragment` and each one after it as it comes, until the log is closed.

        One fragment is in memory at a time. Raises `LogFailed` where a failed video ends. A log that isn't there yet is
        waited for. `ask_end` is asked about once a second while nothing comes: a video that failed before it ran, or
        whose last runner died, may have no end in its log.
        """
        started = False
        async with aclosing(self.watch(from_fragment, ask_end=ask_end)) as entries:
            async for entry in entries:
                if not started:
                    yield await asyncio.to_thread(self.init)
                    started = True
                yield await asyncio.to_thread(self.fragment, entry.index)

    async def watch(self, from_fragment: int = 0, *, ask_end: AskEnd | None = None) -> AsyncGenerator[LogEntry, None]:
        """As `follow`, but what the index says of each fragment instead of its bytes."""
        index = _Index(self.path)
        pause = _SHORTEST_PAUSE_SECONDS
        until_asking = 0.0
        said: LogEnd | None = None
        while True:
            lines = index.read() if index.has_more() else []
            for line in [*lines, *([said] if said and not lines else [])]:
                if isinstance(line, LogEnd):
                    if line.error_code is not None:
                        raise LogFailed(line.error_code, line.error_message or "")
                    return
                if line.index >= from_fragment:
                    yield line
            if lines:
                pause = _SHORTEST_PAUSE_SECONDS
                continue
            if ask_end is not None and until_asking <= 0:
                said = await ask_end()  # and then once more around: it may have been written meanwhile
                until_asking = _ASK_END_SECONDS
                continue
            await _grown.wait(self.path, pause)
            until_asking -= pause
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)

    @property
    def _init_path(self) -> Path:
        return self.path / "init.mp4"

    def _fragment_path(self, index: int) -> Path:
        return self.path / f"{index:08d}.m4s"


class LogWriter:
    """The one attempt that may write. Every method may be tried again after an error; nothing half-written shows."""

    def __init__(self, log: FragmentLog, fence: int, origin: str | None = None) -> None:
        """Use `FragmentLog.create`."""
        self.log = log
        self.fence = fence
        self._origin = origin
        self._last: LogEntry | None = None
        self.trusted = 0
        """How many fragments earlier attempts left that are known to be of this attempt's origin."""
        self._index = _Index(log.path)
        self._count = 0
        self._end: LogEnd | None = None

    async def append(self, index: int, first_frame: int, frames: int, init: bytes, data: bytes) -> None:
        """Add fragment `index`, visible to readers when this returns.

        The same fragment again is a no-op, so that a resumed attempt can go over what an earlier one wrote. Raises
        `LogError` for other bytes, for a gap and after the end, `StaleFence` when a newer attempt has begun.
        """
        await asyncio.to_thread(self._append, index, first_frame, frames, init, data)
        _grown.ring(self.log.path)

    async def close(self) -> None:
        """No more fragments will come: the video is whole. Raises `LogError` when it failed, or `StaleFence`."""
        await self._ended(LogEnd())

    async def fail(self, code: str, message: str) -> None:
        """No more fragments will come. Raises `LogError` when the log was closed as whole, or `StaleFence`."""
        await self._ended(LogEnd(code, message[:_LONGEST_MESSAGE]))

    @property
    def frames(self) -> int:
        """How many frames the log holds."""
        return self._last.first_frame + self._last.frames if self._last else 0

    def check_fence(self) -> None:
        """Raises `StaleFence` when a newer attempt has begun, `FileNotFoundError` when the video is deleted."""
        with self._locked():
            pass

    def _take_over(self) -> None:
        self.log.path.mkdir(parents=True, exist_ok=True)
        with self._locked(taking_over=True):
            for leftover in self.log.path.glob("*.tmp"):
                leftover.unlink()
            if self._origin is not None:
                self._compare_origins(self._origin)

    def _compare_origins(self, origin: str) -> None:
        found = self.log.origin()
        if self._count and found not in (None, origin):
            raise LogError(f"{self.log.video_id}: the model was changed after the video's first frames were shown")
        if self._count == 0:
            _write_whole(self.log.path / "origin", origin.encode())
        elif found is not None:
            self.trusted = self._count

    def _append(self, index: int, first_frame: int, frames: int, init: bytes, data: bytes) -> None:
        with self._locked():
            if self._count and self.log.init() != init:
                raise LogError(f"{self.log.video_id}: the init segment of fragment {index} differs from the video's")
            if index < self._count:
                if self.log.fragment(index) != data:
                    raise LogError(f"{self.log.video_id}: fragment {index} is there already, with other bytes")
                return
            if self._end is not None:
                raise LogError(f"{self.log.video_id}: fragment {index} comes after the end")
            if index > self._count:
                raise LogError(f"{self.log.video_id}: fragment {index} comes before fragment {self._count}")
            if index == 0:
                _write_whole(self.log._init_path, init)
            _write_whole(self.log._fragment_path(index), data)
            entry = LogEntry(index, first_frame, frames, len(data), hashlib.sha256(data).hexdigest())
            self._index.append(entry)
            self._note(entry)

    async def _ended(self, end: LogEnd) -> None:
        await asyncio.to_thread(self._finish, end)
        _grown.ring(self.log.path)

    def _finish(self, end: LogEnd) -> None:
        with self._locked():
            if self._end is None:
                self._index.append(end)
                self._note(end)
            elif (self._end.error_code is None) != (end.error_code is None):
                raise LogError(f"{self.log.video_id}: the log has ended otherwise")

    @contextmanager
    def _locked(self, *, taking_over: bool = False) -> Iterator[None]:
        """Hold the log's lock with a valid fence and an index that is read to its end and has no torn line."""
        flags = os.O_RDWR | (os.O_CREAT if taking_over else 0)
        descriptor = os.open(
            self.log.path / "fence", flags, 0o644
        )  # a lock belongs to one opening, so each has its own
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            newest = int(os.pread(descriptor, 32, 0) or b"-1")
            if newest > self.fence:
                raise StaleFence(f"{self.log.video_id}: fence {self.fence} is older than {newest}")
            if newest < self.fence:
                os.pwrite(descriptor, b"%020d" % self.fence, 0)
                os.fsync(descriptor)
            for line in self._index.read_to_end():
                self._note(line)
            self._index.cut_torn_line()
            yield
        finally:
            os.close(descriptor)

    def _note(self, line: LogEntry | LogEnd) -> None:
        if isinstance(line, LogEnd):
            self._end = line
        else:
            self._count, self._last = line.index + 1, line


class _Index:
    """A place in `index.jsonl`, always between two whole lines."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "index.jsonl"
        self._offset = 0

    def has_more(self) -> bool:
        """Raises `FileNotFoundError` when the log was deleted under its reader."""
        try:
            return os.stat(self._path).st_size > self._offset
        except FileNotFoundError:
            if self._offset:
                raise
            return False

    def read(self) -> list[LogEntry | LogEnd]:
        """The next whole lines, at most a block of them; none at the end."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                block = file.read(_INDEX_BLOCK_BYTES)
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [_parse(line) for line in whole.splitlines()]

    def read_to_end(self) -> Iterator[LogEntry | LogEnd]:
        while lines := self.read():
            yield from lines

    def cut_torn_line(self) -> None:
        """Drop what a crash left after the last whole line. The caller holds the lock and has read to the end."""
        if self.has_more():
            os.truncate(self._path, self._offset)

    def append(self, line: LogEntry | LogEnd) -> None:
        """The caller holds the lock and has read to the end."""
        data = json.dumps(asdict(line), separators=(",", ":")).encode() + b"\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(f"{self._path}: only {written} of {len(data)} bytes were written")
        self._offset += written


def _parse(line: bytes) -> LogEntry | LogEnd:
    fields = json.loads(line)
    return LogEntry(**fields) if "index" in fields else LogEnd(**fields)


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole and durably, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

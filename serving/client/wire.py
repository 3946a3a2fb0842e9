"""What comes over the wire, without the wire: fragments and events from bytes in pieces of any size. No I/O."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.client.errors import RushesError, VideoFailed
from serving.media.pixels import decode_fragment
from serving.media.trailer import read_error

# A chunk is a few seconds of video at most.
_LARGEST_BOX_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Chunk:
    """Fragment `index` of a video: `data` is one `moof`+`mdat`, to be put behind `init`."""

    index: int
    init: bytes = field(repr=False)
    data: bytes = field(repr=False)

    def frames(self) -> NDArray[np.uint8]:
        """RGB `[n, height, width, 3]`."""
        return decode_fragment(self.init, self.data)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a video: `queued`, `started`, `progress`, `chunk`, `completed` or `failed`."""

    name: str
    data: dict[str, Any]
    id: str | None = None


class FragmentReader:
    """Chunks from a stream's bytes, over as many connections as it takes: none twice, none left out."""

    def __init__(self, from_fragment: int = 0) -> None:
        self.next_index = from_fragment
        self._buffer = bytearray()
        self._init = b""
        self._head = b""

    def reconnected(self) -> None:
        """What comes now begins with an init segment again."""
        self._buffer.clear()
        self._init = self._head = b""

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that are whole now. Raises `VideoFailed` at an error's box, `RushesError` for anything wrong."""
        self._buffer += data
        while (box := self._box()) is not None:
            kind = box[4:8]
            if kind in (b"ftyp", b"moov"):
                self._init += box
            elif kind == b"emsg" and (error := read_error(box)) is not None:
                raise VideoFailed(*error)
            elif kind == b"moof":
                self._head = box
            elif kind == b"mdat":
                chunk = Chunk(_sequence_number(self._head) - 1, self._init, self._head + box)
                if chunk.index > self.next_index:
                    raise RushesError(f"fragment {chunk.index} came instead of {self.next_index}")
                if chunk.index == self.next_index:
                    self.next_index += 1
                    yield chunk

    def _box(self) -> bytes | None:
        """The next whole top-level box (ISO/IEC 14496-12, 4.2)."""
        if len(self._buffer) < 8:
            return None
        size = int.from_bytes(self._buffer[:4], "big")
        if not 8 <= size <= _LARGEST_BOX_BYTES:
            raise RushesError("what came is no fragmented MP4")
        if len(self._buffer) < size:
            return None
        box = bytes(self._buffer[:size])
        del self._buffer[:size]
        return box


class EventReader:
    """Server-sent events from lines (HTML Living Standard, 9.2.6)."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self._fields: dict[str, str] = {}

    def reconnected(self) -> None:
        self._fields.clear()

    def feed(self, line: str) -> Event | None:
        if line.startswith(":"):
            return None
        if line:
            name, _, value = line.partition(":")
            self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        self.last_id = fields.get("id", self.last_id)
        return Event(fields.get("event", "message"), json.loads(fields["data"]), fields.get("id"))


def _sequence_number(moof: bytes) -> int:
    """Of the `mfhd` box, which is a `moof`'s first (8.8.5)."""
    if moof[12:16] != b"mfhd":
        raise RushesError("what came is no fragmented MP4")
    (number,) = struct.unpack_from(">I", moof, 20)
    return int(number)

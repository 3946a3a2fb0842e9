"""How long a fragment plays, from its boxes alone: decoding it would take the cores that are being measured."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_CONTAINERS = (b"moov", b"trak", b"mdia", b"moof", b"traf")
_TFHD_DURATION, _TRUN_DURATION = 0x000008, 0x000100
# What `tfhd` and `trun` may have before the default duration, or a sample's own (8.8.7 and 8.8.8).
_TFHD_BEFORE = {0x000001: 8, 0x000002: 4}
_TRUN_HEAD = {0x000001: 4, 0x000004: 4}
_TRUN_SAMPLE = {0x000100: 4, 0x000200: 4, 0x000400: 4, 0x000800: 4}


def fragment_seconds(init: bytes, fragment: bytes) -> float:
    """Of one `moof`+`mdat` with one track (ISO/IEC 14496-12). Raises `ValueError` for what has no durations."""
    try:
        ticks, timescale = _ticks(init, fragment), _timescale(init)
    except (struct.error, IndexError):
        raise ValueError("what came is no MP4") from None
    if not ticks:
        raise ValueError("the fragment says no duration")
    return ticks / timescale


def _ticks(init: bytes, fragment: bytes) -> int:
    ticks = 0
    default: int | None = None
    for kind, body in _boxes(fragment):
        if kind == b"tfhd":
            default = _default_duration(body)
        elif kind == b"trun":
            ticks += _duration(body, _trex_duration(init) if default is None else default)
    return ticks


def _timescale(init: bytes) -> int:
    for kind, body in _boxes(init):
        if kind == b"mdhd":
            (timescale,) = struct.unpack_from(">I", body, 20 if body[0] == 1 else 12)
            if timescale:
                return int(timescale)
    raise ValueError("the init segment says no timescale")


def _trex_duration(init: bytes) -> int | None:
    """The default of the whole track, after its id and its description's index (8.8.3)."""
    at = init.find(b"trex")
    return None if at < 0 else int(struct.unpack_from(">I", init, at + 16)[0]) or None


def _default_duration(tfhd: bytes) -> int | None:
    flags = int.from_bytes(tfhd[1:4], "big")
    if not flags & _TFHD_DURATION:
        return None
    before = sum(size for flag, size in _TFHD_BEFORE.items() if flags & flag)
    return int(struct.unpack_from(">I", tfhd, 8 + before)[0])


def _duration(trun: bytes, default: int | None) -> int:
    flags, (count,) = int.from_bytes(trun[1:4], "big"), struct.unpack_from(">I", trun, 4)
    if not flags & _TRUN_DURATION:
        if default is None:
            raise ValueError("the fragment says no duration")
        return int(count) * default
    start = 8 + sum(size for flag, size in _TRUN_HEAD.items() if flags & flag)
    step = sum(size for flag, size in _TRUN_SAMPLE.items() if flags & flag)
    return sum(struct.unpack_from(">I", trun, start + number * step)[0] for number in range(count))


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and body of every box, those within boxes too."""
    offset = 0
    while offset + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        if not 8 <= size <= len(data) - offset:
            raise ValueError("what came is no MP4")
        body = data[offset + 8 : offset + size]
        yield kind, body
        if kind in _CONTAINERS:
            yield from _boxes(body)
        offset += size

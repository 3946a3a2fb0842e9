"""Fragmented MP4 (ISO/IEC 14496-12, CMAF): one decoded chunk in, one `moof`+`mdat` out, with no lag and no memory.

A fragment is a pure function of its frames and its place in the video, so that a chunk decoded again after a crash has
the same bytes. Three choices make that true: every fragment has an encoder of its own (constant QP, so there is no rate
control to warm up), everything is done on one thread with swscale and x264 told to ignore the CPU's own shortcuts, and
nothing that names a version or a date is written.
"""

from __future__ import annotations

import io
import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.codec.context import Flags
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from numpy.typing import NDArray

# At 18, what 4:2:0 costs hides what the quantiser does (38 to 40 dB in RGB, 52 in luma, on the clips of models/mini).
QP = 18
PRESET = "fast"

# ISO/IEC 23091-2: 1 is bt709 for the matrix as for primaries and transfer. PyAV has no enum for the AVColorSpace one.
_MATRIX_BT709 = 1

# One muxer lives for one fragment (libavformat would otherwise hold a fragment back until the next packet): the
# header is written each time and cut off, `frag_discont` makes `tfdt` follow the packets' own timestamps.
_MUXER_OPTIONS = {
    "movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer+cmaf",
    "use_editlist": "0",
    "fflags": "+bitexact",
}
_ENCODER_OPTIONS = {
    "preset": PRESET,
    "qp": str(QP),
    # A cut inside a fragment must not make a second key frame: readers count on one, at the start.
    "x264-params": "scenecut=0:open-gop=0:cpu-independent=1",
}
# The key frame is the fragment's first; a fragment longer than this is not made anywhere.
_LONGEST_GOP_FRAMES = 1 << 16
# x264 puts its version and settings into a user-data message (NAL unit type 6) of each stream's first packet: 700
# bytes a fragment here, and bytes that would change with the library.
_DROP_SEI = "filter_units=remove_types=6"
_SWSCALE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INP


@dataclass(frozen=True, slots=True)
class EncodedFragment:
    """`init` is `ftyp`+`moov`, the same for every fragment of a video; `data` is one `moof`+`mdat`."""

    init: bytes
    data: bytes


def encode_fragment(frames: NDArray[np.uint8], *, fps: int, index: int, first_frame: int) -> EncodedFragment:
    """Encode RGB `frames` uint8 `[n, height, width, 3]` as fragment `index` (from 0), which starts at `first_frame`.

    H.264 High, `yuv420p`, bt709 limited range; the first frame is an IDR, the others P frames. Times are in units of
    1 / `fps` s. Raises `ValueError` for anything else than such frames with even sides.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[0] == 0:
        raise ValueError(f"frames must be uint8 [n, height, width, 3], not {frames.dtype} {list(frames.shape)}")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2 or not height or not width:
        raise ValueError(f"yuv420p needs even sides, not {width}x{height}")
    if fps < 1 or index < 0 or first_frame < 0:
        raise ValueError(f"fps {fps}, index {index}, first_frame {first_frame}: fps must be positive, none negative")

    sink = _Sink()
    with av.open(sink, "w", format="mp4", options=_MUXER_OPTIONS | {"fragment_index": str(index + 1)}) as muxer:
        stream = muxer.add_stream("libx264", rate=fps, options=_ENCODER_OPTIONS)
        codec = stream.codec_context
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.time_base = Fraction(1, fps)
        codec.thread_count = 1
        codec.gop_size = _LONGEST_GOP_FRAMES
        codec.max_b_frames = 0
        codec.flags |= Flags.bitexact | Flags.closed_gop
        codec.colorspace, codec.color_range = _MATRIX_BT709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        drop_sei = BitStreamFilterContext(_DROP_SEI, "h264")
        encoded = [packet for frame in _yuv_frames(frames, fps, first_frame) for packet in codec.encode(frame)]
        for packet in encoded + codec.encode():
            for kept in drop_sei.filter(packet):
                kept.stream = stream
                muxer.mux(kept)
    boxes = dict(_top_level_boxes(sink.getvalue()))
    return EncodedFragment(init=boxes[b"ftyp"] + boxes[b"moov"], data=boxes[b"moof"] + boxes[b"mdat"])


def codec_string(init: bytes) -> str:
    """The RFC 6381 name of an init segment's H.264 track, such as `avc1.64000C` (ISO/IEC 14496-15, 5.3.3.1)."""
    avcc = init.find(b"avcC")
    if avcc < 0 or len(init) < avcc + 8:
        raise ValueError("not an init segment with an H.264 track")
    # After the type: configurationVersion, then profile, compatibility and level, a byte each.
    return f"avc1.{init[avcc + 5 : avcc + 8].hex().upper()}"


def remux_to_mp4(init: bytes, fragments: Iterable[bytes], path: Path) -> None:
    """Write the same packets as one progressive MP4 with its index in front; nothing is encoded again.

    `path` appears whole or not at all. Memory use doesn't grow with the fragments' bytes.
    """
    # `faststart` opens its own output a second time, so this can't be a file object.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with (
            av.open(_Concatenated(init, fragments), "r", format="mp4") as source,
            av.open(
                str(temporary), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
            ) as target,
        ):
            video = source.streams.video[0]
            stream = target.add_stream_from_template(video)
            for packet in source.demux(video):
                if packet.dts is None:  # PyAV ends a demux with one empty packet, for decoders
                    continue
                packet.stream = stream
                target.mux(packet)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _yuv_frames(frames: NDArray[np.uint8], fps: int, first_frame: int) -> Iterator[Any]:
    """`av.VideoFrame`s in bt709 limited range, timed from `first_frame` on."""
    convert = VideoReformatter()
    for offset, pixels in enumerate(frames):
        frame = convert.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
            interpolation=_SWSCALE,
            threads=1,
        )
        frame.pts, frame.time_base, frame.duration = first_frame + offset, Fraction(1, fps), 1
        yield frame


def _top_level_boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and bytes (header included) of each box of a file (ISO/IEC 14496-12, 4.2)."""
    offset = 0
    while offset < len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        yield kind, data[offset : offset + size]
        offset += size


class _Sink:
    """A file that can only be written to: libavformat then never goes back to what it has written."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def getvalue(self) -> bytes:
        return b"".join(self._parts)


class _Concatenated:
    """A file that can only be read forwards, over the init segment and the fragments one at a time."""

    def __init__(self, init: bytes, fragments: Iterable[bytes]) -> None:
        self._rest = iter(fragments)
        self._current = io.BytesIO(init)

    def read(self, size: int) -> bytes:
        while True:
            data = self._current.read(size)
            if data:
                return data
            fragment = next(self._rest, None)
            if fragment is None:
                return b""
            self._current = io.BytesIO(fragment)

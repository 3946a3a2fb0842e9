"""Fragmented MP4 (ISO/IEC 14496-12, CMAF): one decoded chunk in, one `moof`+`mdat` out, with no lag and no memory.

A fragment is a pure function of its frames and its place in the video, so that a chunk decoded again after a crash has
the same bytes. With a software encoder three choices make that true: every fragment has an encoder of its own (constant
QP, so there is no rate control to warm up), everything is done on one thread with swscale and the encoder told to
ignore the CPU's own shortcuts, and nothing that names a version or a date is written.
"""

from __future__ import annotations

import io
import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from serving.media.encoders import CODECS, SOFTWARE, Codec, Encoder

__all__ = [
    "CODECS",
    "Codec",
    "EncodedFragment",
    "codec_string",
    "encode_fragment",
    "remux_to_mp4",
]

# One muxer lives for one fragment (libavformat would otherwise hold a fragment back until the next packet): the
# header is written each time and cut off, `frag_discont` makes `tfdt` follow the packets' own timestamps.
_MUXER_OPTIONS = {
    "movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer+cmaf",
    "use_editlist": "0",
    "fflags": "+bitexact",
}
_SWSCALE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INP


@dataclass(frozen=True, slots=True)
class EncodedFragment:
    """`init` is `ftyp`+`moov`, the same for every fragment of a video; `data` is one `moof`+`mdat`."""

    init: bytes
    data: bytes


def encode_fragment(
    frames: NDArray[np.uint8],
    *,
    fps: int,
    index: int,
    first_frame: int,
    codec: Codec = "h264",
    encoders: Mapping[Codec, Encoder] = SOFTWARE,
) -> EncodedFragment:
    """Encode RGB `frames` uint8 `[n, height, width, 3]` as fragment `index` (from 0), which starts at `first_frame`.

    H.264 High, AV1 Main or VP9 profile 0; `yuv420p`, bt709 limited range; the first frame is a key frame, no other is,
    and none is shown before one that comes earlier. Times are in units of 1 / `fps` s. All fragments of a video are of
    the same `encoders`. Raises `ValueError` for anything else than such frames with even sides.
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
        encoder = encoders[codec] if min(width, height) >= encoders[codec].least_side else SOFTWARE[codec]
        stream = muxer.add_stream(encoder.name, rate=fps)
        context = stream.codec_context
        encoder.set_up(context, width, height, fps)
        filtered = BitStreamFilterContext(encoder.filter, codec).filter if encoder.filter else lambda packet: [packet]
        encoded = [packet for frame in _yuv_frames(frames, fps, first_frame) for packet in context.encode(frame)]
        for packet in encoded + context.encode():
            for kept in filtered(packet):
                kept.stream = stream
                # Only x264 says how long a frame lasts, and a fragment's last one has no next to tell it by.
                kept.duration = kept.duration or 1
                muxer.mux(kept)
    boxes = dict(_top_level_boxes(sink.getvalue()))
    return EncodedFragment(init=boxes[b"ftyp"] + boxes[b"moov"], data=boxes[b"moof"] + boxes[b"mdat"])


def codec_string(init: bytes) -> str:
    """The RFC 6381 name of what an init segment is for, such as `avc1.64000C`, `av01.0.00M.08` or `vp09.00.10.08`.

    By ISO/IEC 14496-15, 5.3.3.1, and the AV1 and VP9 bindings to ISOBMFF. Raises `ValueError` for anything else.
    """
    for kind, name in ((b"avcC", _avc_name), (b"av1C", _av1_name), (b"vpcC", _vp9_name)):
        start = init.find(kind) + len(kind)
        if start >= len(kind) and len(init) >= start + 8:
            return name(init[start : start + 8])
    raise ValueError("not an init segment with a track of H.264, AV1 or VP9")


def _avc_name(box: bytes) -> str:
    # After configurationVersion: profile, compatibility and level, a byte each.
    return f"avc1.{box[1:4].hex().upper()}"


def _av1_name(box: bytes) -> str:
    # After the version: 3 bits of profile and 5 of level; then tier, and whether there are more than 8 or 10 bits.
    profile, level = box[1] >> 5, box[1] & 31
    tier, bits = "MH"[box[2] >> 7], 8 + 2 * (box[2] >> 6 & 1) + 2 * (box[2] >> 5 & 1)
    return f"av01.{profile}.{level:02d}{tier}.{bits:02d}"


def _vp9_name(box: bytes) -> str:
    # After version and flags: profile, level, and 4 bits of bit depth.
    return f"vp09.{box[4]:02d}.{box[5]:02d}.{box[6] >> 4:02d}"


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
            # PyAV (18) looks for an encoder of the decoder's name, which AV1's has none of, unless it is told not to.
            stream = target.add_stream_from_template(video, opaque=video.codec_context.name != "h264")
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

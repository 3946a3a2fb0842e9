"""The encoders of video: libavcodec's in software, and NVIDIA's hardware where this machine has it.

Software is bit-exact everywhere, so a chunk that is encoded again has the same bytes. Hardware isn't, and
its stream begins otherwise: all decoders of a service must use the same, or a video fails when one of them goes on
with it for another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc

Codec = Literal["h264", "av1", "vp9"]
CODECS: tuple[Codec, ...] = get_args(Codec)
VideoEncoder = Literal["auto", "software", "nvenc"]

# At 18, what 4:2:0 costs hides what the quantiser does (38 to 40 dB in RGB, 52 in luma, on the clips of models/mini).
QP = 18
# Half the time of "fast" for 1.6 dB of 43: a chunk waits for this on its way to the viewer.
PRESET = "veryfast"
# ISO/IEC 23091-2: 1 is bt709 for the matrix as for primaries and transfer. PyAV has no enum for the AVColorSpace one.
_MATRIX_BT709 = 1
# SVT-AV1 tells standard error about itself at every fragment; it reads this when it is first used.
os.environ.setdefault("SVT_LOG", "1")
# The key frame is the fragment's first; a fragment longer than this is not made anywhere.
_LONGEST_GOP_FRAMES = 1 << 16
# x264 puts its version and settings into a user-data message (NAL unit type 6) of each stream's first packet: 700
# bytes a fragment here, and bytes that would change with the library.
_DROP_SEI = "filter_units=remove_types=6"
# Large enough for every encoder.
_PROBE_SIDE = 256


class EncoderError(RuntimeError):
    """The encoder that was asked for can't be used on this machine."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """One of libavcodec's, at a constant quality: the codecs' differ by less than a dB on the clips of the tests.

    Pictures with a side below `least_side` it doesn't take.
    """

    name: str
    options: Mapping[str, str]
    filter: str | None = None
    least_side: int = 0

    def set_up(self, context: Any, width: int, height: int, fps: int) -> None:
        """One thread; a key frame first and no other, none out of order; bt709, limited range; constant frame rate."""
        context.options = dict(self.options)
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base, context.framerate = Fraction(1, fps), Fraction(fps)
        context.thread_count = 1
        context.gop_size = _LONGEST_GOP_FRAMES
        context.max_b_frames = 0
        context.flags |= Flags.bitexact | Flags.closed_gop
        context.colorspace, context.color_range = _MATRIX_BT709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def why_not(self) -> str | None:
        """Why one small frame can't be encoded here; None when it can."""
        try:
            context = av.CodecContext.create(self.name, "w")
            self.set_up(context, _PROBE_SIDE, _PROBE_SIDE, 16)
            frame = av.VideoFrame.from_ndarray(np.zeros((_PROBE_SIDE * 3 // 2, _PROBE_SIDE), np.uint8), "yuv420p")
            frame.pts = 0
            found = [*context.encode(frame), *context.encode(None)]
        except (av.FFmpegError, ValueError) as error:
            return f"{self.name}: {error}"
        return None if found else f"{self.name}: it makes nothing"


SOFTWARE: Mapping[Codec, Encoder] = {
    "h264": Encoder(
        "libx264",
        {
            "preset": PRESET,
            "qp": str(QP),
            # A cut inside a fragment must not make a second key frame: readers count on one, at the start.
            "x264-params": "scenecut=0:open-gop=0:cpu-independent=1",
        },
        _DROP_SEI,
    ),
    # No picture waits for a later one, so none is left over at the end of a fragment.
    "av1": Encoder(
        "libsvtav1",
        {"preset": "8", "crf": "18", "svtav1-params": "pred-struct=1:lookahead=0:scd=0:enable-tf=0:lp=1"},
    ),
    "vp9": Encoder(
        "libvpx-vp9",
        {"deadline": "realtime", "cpu-used": "5", "crf": "16", "b": "0", "lag-in-frames": "0", "auto-alt-ref": "0"},
    ),
}
# NVIDIA's Video Codec SDK: H.264 from 145x49 on.
NVENC: Mapping[Codec, Encoder] = {
    "h264": Encoder(
        "h264_nvenc",
        {
            "rc": "constqp",
            "qp": str(QP),
            "preset": "p4",
            "profile": "high",
            "no-scenecut": "1",
            "b_ref_mode": "disabled",
            "rc-lookahead": "0",
            "delay": "0",
            "zerolatency": "1",
        },
        _DROP_SEI,
        least_side=160,
    ),
}


def encoders(wanted: VideoEncoder, hardware: Mapping[Codec, Encoder] = NVENC) -> Mapping[Codec, Encoder]:
    """What encodes each codec on this machine: `hardware` where it is wanted, or where it is found and all is wanted.

    Raises `EncoderError` when it must be there for H.264 and isn't.
    """
    if wanted == "software":
        return SOFTWARE
    missing = {codec: why for codec, encoder in hardware.items() if (why := encoder.why_not()) is not None}
    if wanted == "nvenc" and "h264" in missing:
        raise EncoderError(f"video_encoder is nvenc, but this machine can't: {missing['h264']}")
    return {**SOFTWARE, **{codec: encoder for codec, encoder in hardware.items() if codec not in missing}}

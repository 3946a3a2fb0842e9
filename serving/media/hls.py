"""HLS playlists of a fragment log (RFC 8216bis, fMP4): pure text, from the number of frames in each fragment.

A fragment is a part, and parts make up a segment until it lasts `SEGMENT_SECONDS`: a player that knows parts (low
latency) is one chunk behind the denoiser, any other one segment. Only the first segment is a single part, so that there
is one from the beginning: hls.js (1.7) takes a playlist of parts alone for an empty one. Every part begins with a key
frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SEGMENT_SECONDS = 2.0
MEDIA_PLAYLIST, INIT = "media.m3u8", "init.mp4"
# EXT-X-PART and its relatives are of the protocol's newest version, as Apple's own playlists say.
_VERSION = 9


@dataclass(frozen=True, slots=True)
class Segment:
    """Segment `index` holds the fragments `first` up to but without `stop`."""

    index: int
    first: int
    stop: int
    frames: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Timeline:
    """What there is of a video: `frames` of each fragment, at `fps`, none longer than `chunk_seconds`."""

    frames: Sequence[int]
    fps: int
    chunk_seconds: float
    ended: bool

    def segments(self) -> list[Segment]:
        """In order. All but the last are whole; that one is when the video has ended or it is long enough."""
        segments: list[Segment] = []
        first = held = 0
        for index, frames in enumerate(self.frames):
            held += frames
            long_enough = index == 0 or held >= SEGMENT_SECONDS * self.fps
            if long_enough or index == len(self.frames) - 1:
                whole = long_enough or self.ended
                segments.append(Segment(len(segments), first, index + 1, held, whole))
                first, held = index + 1, 0
        return segments

    def has(self, sequence: int, part: int | None) -> bool:
        """Whether segment `sequence` is whole, or its part `part` is there (RFC 8216bis, 6.2.5.2)."""
        segments = self.segments()
        if self.ended or any(segment.index == sequence and segment.whole for segment in segments):
            return True
        if part is None:
            return False
        # A part beyond a segment's last is the first of the next segment.
        return any(s.index > sequence or (s.index == sequence and s.stop - s.first > part) for s in segments)


def media_playlist(timeline: Timeline) -> str:
    """An `EVENT` playlist that grows, with parts; once the video has ended, a `VOD` playlist of whole segments."""
    target = math.ceil(SEGMENT_SECONDS + timeline.chunk_seconds)
    lines = ["#EXTM3U", f"#EXT-X-VERSION:{_VERSION}", f"#EXT-X-TARGETDURATION:{target}"]
    if not timeline.ended:
        hold = f"PART-HOLD-BACK={3 * timeline.chunk_seconds:.5f},HOLD-BACK={3 * target}"
        lines.append(f"#EXT-X-SERVER-CONTROL:CAN-BLOCK-RELOAD=YES,{hold}")
        lines.append(f"#EXT-X-PART-INF:PART-TARGET={timeline.chunk_seconds:.5f}")
    lines += [
        "#EXT-X-MEDIA-SEQUENCE:0",
        f"#EXT-X-PLAYLIST-TYPE:{'VOD' if timeline.ended else 'EVENT'}",
        "#EXT-X-INDEPENDENT-SEGMENTS",
        f'#EXT-X-MAP:URI="{INIT}"',
    ]
    frames_left = sum(timeline.frames)
    for segment in timeline.segments():
        frames_left -= segment.frames
        # Parts that are so far from the end that nobody begins with them are of no use (4.4.4.9).
        if not timeline.ended and frames_left / timeline.fps <= 3 * target:
            for part in range(segment.first, segment.stop):
                seconds = timeline.frames[part] / timeline.fps
                lines.append(f'#EXT-X-PART:DURATION={seconds:.5f},URI="{part_name(part)}",INDEPENDENT=YES')
        if segment.whole:
            lines += [f"#EXTINF:{segment.frames / timeline.fps:.5f},", segment_name(segment.index)]
    if timeline.ended:
        lines.append("#EXT-X-ENDLIST")
    else:
        lines.append(f'#EXT-X-PRELOAD-HINT:TYPE=PART,URI="{part_name(len(timeline.frames))}"')
    return "\n".join(lines) + "\n"


def multivariant_playlist(*, codec: str, width: int, height: int, fps: int, peak_bits: int, average_bits: int) -> str:
    """The playlist to begin with; it says what is in the only variant, in bits a second."""
    about = [
        f"BANDWIDTH={peak_bits}",
        f"AVERAGE-BANDWIDTH={average_bits}",
        f'CODECS="{codec}"',
        f"RESOLUTION={width}x{height}",
        f"FRAME-RATE={fps:.3f}",
    ]
    lines = ["#EXTM3U", f"#EXT-X-VERSION:{_VERSION}", "#EXT-X-INDEPENDENT-SEGMENTS"]
    return "\n".join([*lines, f"#EXT-X-STREAM-INF:{','.join(about)}", MEDIA_PLAYLIST]) + "\n"


def part_name(index: int) -> str:
    """A part's URI, relative to the playlist's."""
    return f"parts/{index}.m4s"


def segment_name(index: int) -> str:
    """A segment's URI, relative to the playlist's."""
    return f"segments/{index}.m4s"

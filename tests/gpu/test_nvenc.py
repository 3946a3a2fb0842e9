"""The GPU's own encoder makes fragments as the software's are."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from serving.media.encoders import NVENC, encoders
from serving.media.fmp4 import codec_string, encode_fragment
from serving.media.pixels import decode_fragment

pytestmark = pytest.mark.gpu

FRAMES = 13


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    if (reason := NVENC["h264"].why_not()) is not None:
        pytest.skip(f"this machine has no NVENC ({reason})")
    rows, columns = np.mgrid[:256, :320]
    return np.stack(
        [np.stack([rows % 256, columns * 255 // 320, np.full_like(rows, 9 * n)], -1) for n in range(FRAMES)]
    ).astype(np.uint8)


def test_a_fragment_is_whole_and_the_same_again(clip: np.ndarray) -> None:
    chosen = encoders("auto")
    first, again = (encode_fragment(clip, fps=16, index=2, first_frame=21, encoders=chosen) for _ in range(2))
    assert first == again
    assert codec_string(first.init).startswith("avc1.64")
    with av.open(io.BytesIO(first.init + first.data)) as opened:
        packets = [packet for packet in opened.demux(video=0) if packet.dts is not None]
        context = opened.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
    assert [packet.is_keyframe for packet in packets] == [True] + [False] * (FRAMES - 1)
    assert [packet.pts for packet in packets] == [packet.dts for packet in packets]
    assert {packet.duration for packet in packets} == {packets[0].duration}
    error = (decode_fragment(first.init, first.data).astype(float) - clip) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 34


def test_every_fragment_of_a_video_follows_the_same_init_segment(clip: np.ndarray) -> None:
    chosen = encoders("nvenc")
    made = [encode_fragment(clip[n:], fps=16, index=n, first_frame=n, encoders=chosen) for n in range(3)]
    assert len({fragment.init for fragment in made}) == 1

"""Which encoder a machine's videos are made by."""

from __future__ import annotations

import av
import numpy as np
import pytest

from serving.media.encoders import NVENC, SOFTWARE, Encoder, EncoderError, encoders
from serving.media.fmp4 import encode_fragment

# Of libavcodec's here, one that stands where hardware's would.
OTHER = Encoder("libx264", {"preset": "ultrafast", "qp": "18"}, least_side=160)
NOWHERE = Encoder("h264_rkmpp_of_another_board", {})


def frames(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (3, side, side, 3), np.uint8)


@pytest.mark.parametrize("wanted", ["auto", "nvenc"])
def test_hardware_that_opens_is_used_for_pictures_that_it_takes(wanted: str) -> None:
    chosen = encoders(wanted, {"h264": OTHER})  # type: ignore[arg-type]  # a name, as text
    assert chosen == {**SOFTWARE, "h264": OTHER}
    for side, same in ((64, True), (160, False)):
        made, software = (
            encode_fragment(frames(side), fps=16, index=0, first_frame=0, encoders=each) for each in (chosen, SOFTWARE)
        )
        assert (made == software) is same


def test_hardware_that_does_not_open_is_left_alone_or_said() -> None:
    assert encoders("auto", {"h264": NOWHERE}) == SOFTWARE
    with pytest.raises(EncoderError, match="video_encoder is nvenc, but this machine can't: h264_rkmpp"):
        encoders("nvenc", {"h264": NOWHERE})
    assert encoders("software", {"h264": OTHER}) == SOFTWARE


def test_a_machine_without_nvenc_is_found_out() -> None:
    """PyAV's wheel has the encoder compiled in on every machine: only opening it tells."""
    assert "h264_nvenc" in av.codecs_available
    if NVENC["h264"].why_not() is None:
        pytest.skip("this machine has NVENC: tests/gpu encodes with it")
    assert encoders("auto") == SOFTWARE
    with pytest.raises(EncoderError, match="h264_nvenc"):
        encoders("nvenc")

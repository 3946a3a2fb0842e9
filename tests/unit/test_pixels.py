"""Fragments back to pixels: near to what went in, in the colours that the tags promise."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from serving.media.fmp4 import EncodedFragment, encode_fragment
from serving.media.pixels import Picture, decode_fragment, describe, preview

SHADES = np.array([[200, 60, 40], [40, 160, 60], [60, 80, 200], [180, 180, 60], [128, 128, 128]], np.uint8)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Five frames, each of one colour: `[5, 64, 96, 3]`."""
    return np.broadcast_to(SHADES[:, None, None], (5, 64, 96, 3)).copy()


@pytest.fixture(scope="module")
def fragments(frames: np.ndarray) -> list[EncodedFragment]:
    return [
        encode_fragment(frames[:2], fps=16, index=0, first_frame=0),
        encode_fragment(frames[2:], fps=16, index=1, first_frame=2),
    ]


def test_any_fragment_gives_back_its_own_frames(frames: np.ndarray, fragments: list[EncodedFragment]) -> None:
    for fragment, sent in zip(fragments, (frames[:2], frames[2:]), strict=True):
        seen = decode_fragment(fragment.init, fragment.data)
        assert (seen.dtype, seen.shape) == (np.uint8, sent.shape)
        # The matrix of bt601 in place of bt709 would be 20 and more off in such colours.
        assert np.abs(seen.astype(int) - sent).max() <= 4


def test_a_fragment_says_what_the_video_is(fragments: list[EncodedFragment]) -> None:
    assert describe(fragments[0].init, fragments[1].data) == Picture(width=96, height=64, fps=16)


def test_a_preview_is_a_small_picture_of_the_first_frame(fragments: list[EncodedFragment]) -> None:
    with av.open(io.BytesIO(preview(fragments[0].init, fragments[1].data, 48))) as opened:
        pixels = next(opened.decode(video=0)).to_ndarray(format="rgb24")
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - SHADES[2]).max() <= 6

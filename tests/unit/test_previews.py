"""Thumbnails and sprite sheets show the frames they should, in the right places."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import PreviewInfo
from serving.media.fmp4 import encode_fragment, remux_to_mp4
from serving.media.latents import latent_preview
from serving.media.previews import sprite_sheet, thumbnail


def write_clip(path: Path, frames: int, height: int, width: int) -> None:
    """Frame n is evenly grey, and brighter than the one before."""
    levels = np.linspace(20, 230, frames).astype(np.uint8)
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))
    fragment = encode_fragment(np.ascontiguousarray(pixels), fps=16, index=0, first_frame=0)
    remux_to_mp4(fragment.init, [fragment.data], path)


def decoded(picture: bytes) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(picture)) as opened:
        return next(opened.decode(video=0)).to_ndarray(format="rgb24")


def test_the_thumbnail_is_the_frame_in_the_middle(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 33, 64, 96)
    picture = thumbnail(tmp_path / "clip.mp4")
    assert (picture[:4], picture[8:12]) == (b"RIFF", b"WEBP")
    pixels = decoded(picture)
    assert pixels.shape == (64, 96, 3)
    assert abs(pixels.mean() - 125) < 5


def test_a_sprite_sheet_runs_left_to_right_and_down(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 65, 64, 96)
    picture = sprite_sheet(tmp_path / "clip.mp4")
    assert picture[:2] == b"\xff\xd8"
    pixels = decoded(picture)
    assert pixels.shape == (5 * 64, 5 * 96, 3)
    tiles = pixels.reshape(5, 64, 5, 96, 3).mean(axis=(1, 3, 4)).ravel()
    assert (np.diff(tiles) > 3).all()
    assert tiles[0] < 40
    assert tiles[-1] > 210


@pytest.mark.parametrize(("frames", "shape"), [(1, (64, 64, 3)), (4, (64, 256, 3)), (7, (128, 320, 3))])
def test_a_short_clip_has_a_tile_a_frame(tmp_path: Path, frames: int, shape: tuple[int, ...]) -> None:
    write_clip(tmp_path / "clip.mp4", frames, 64, 64)
    assert decoded(sprite_sheet(tmp_path / "clip.mp4")).shape == shape


def test_large_frames_are_made_smaller(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 2, 720, 1280)
    assert decoded(thumbnail(tmp_path / "clip.mp4")).shape == (288, 512, 3)
    assert decoded(sprite_sheet(tmp_path / "clip.mp4")).shape == (144, 512, 3)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, (128, 128)), (60, 104, (60, 104)), (9, 5, (126, 70))])
def test_latents_can_be_seen_without_a_decoder(height: int, width: int, size: tuple[int, int]) -> None:
    """The first frame: red from its first channel at the left, blue from its second at the right."""
    latents = np.zeros((2, 3, height, width), np.float32)
    latents[0, 0, :, : width // 2], latents[1, 0, :, width // 2 :] = 1, 1
    latents[:, 1:] = 100
    colours = PreviewInfo(factors=((0.5, 0, 0), (0, 0, 0.9)), bias=(0.25, 0.25, 0.0))
    picture = decoded(latent_preview(latents, colours)).astype(int)
    assert picture.shape == (*size, 3)
    for column, expected in ((0, (191, 64, 0)), (-1, (64, 64, 230))):
        assert np.abs(picture[:, column] - expected).max() < 12

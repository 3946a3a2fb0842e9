"""Reading frames: any rate and shape becomes the model's, upright, and what is no picture is said to be none."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from serving.media.frames import UnreadableError, middle_frame, read_all, read_frames, write_exactly

Frames = NDArray[np.uint8]


def halves(width: int, height: int) -> Frames:
    """Red on the left, blue on the right, and a green stripe along the top."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2, 0] = 250
    picture[:, width // 2 :, 2] = 250
    picture[: height // 4] = (0, 250, 0)
    return picture


def write_picture(path: Path, picture: Frames, codec: str = "png", pixel_format: str = "rgb24") -> Path:
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width, encoder.pix_fmt = *picture.shape[:2], pixel_format
    encoder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))
    return path


def near(pixel: NDArray[np.uint8], color: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - color).max() < 40)


@pytest.mark.parametrize(("codec", "pixel_format"), [("png", "rgb24"), ("mjpeg", "yuvj444p"), ("libwebp", "yuv420p")])
def test_a_picture_is_one_frame_that_covers_the_size(tmp_path: Path, codec: str, pixel_format: str) -> None:
    path = write_picture(tmp_path / "a", halves(200, 80), codec, pixel_format)
    (frame,) = read_frames(path, fps=16, width=64, height=64)
    assert frame.shape == (64, 64, 3)
    # Twice too wide: the middle is left, in its own proportions.
    assert near(frame[4, 32], (0, 250, 0))
    assert near(frame[40, 8], (250, 0, 0))
    assert near(frame[40, 56], (0, 0, 250))
    assert not near(frame[24, 8], (0, 250, 0))


def test_a_video_gets_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    shades = [np.full((32, 32, 3), 8 * index, np.uint8) for index in range(25)]
    assert write_exactly(tmp_path / "a.mkv", iter(shades), fps=25) == 25
    fewer = [int(frame[0, 0, 0]) // 8 for frame in read_frames(tmp_path / "a.mkv", fps=5, width=32, height=32)]
    assert fewer[:5] == pytest.approx([0, 5, 10, 15, 20], abs=1)
    assert len(fewer) in (5, 6)
    more = [int(frame[0, 0, 0]) // 8 for frame in read_frames(tmp_path / "a.mkv", fps=50, width=32, height=32)]
    assert more[:6] == pytest.approx([0, 0, 1, 1, 2, 2], abs=1)
    assert 49 <= len(more) <= 50


def test_what_was_written_exactly_is_read_to_the_bit(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (5, 48, 32, 3), np.uint8)
    write_exactly(tmp_path / "a.mkv", iter(frames), fps=16)
    assert np.array_equal(read_all(tmp_path / "a.mkv", 32, 48, 5), frames)
    assert np.array_equal(read_all(tmp_path / "a.mkv", 32, 48, 2), frames[:2])
    with pytest.raises(UnreadableError, match=r"5 frames of 32x48 instead of 6"):
        read_all(tmp_path / "a.mkv", 32, 48, 6)
    with pytest.raises(UnreadableError, match=r"instead of 5 of 64x48"):
        read_all(tmp_path / "a.mkv", 64, 48, 5)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP", b"\0" * 5000]
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableError):
        list(read_frames(tmp_path / "a.png", fps=16, width=64, height=64))


def test_a_cut_off_picture_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    whole = write_picture(tmp_path / "a.png", noise).read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UnreadableError):
        list(read_frames(tmp_path / "a.png", fps=16, width=64, height=64))


def test_a_small_file_of_endless_pixels_is_refused(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", np.zeros((9000, 9000, 3), np.uint8))
    with pytest.raises(UnreadableError, match="9000x9000 pixels are too many"):
        list(read_frames(path, fps=16, width=64, height=64))


def test_the_middle_frame_is_upright_and_no_larger_than_asked_for(tmp_path: Path) -> None:
    shades = [np.full((32, 64, 3), 20 * index, np.uint8) for index in range(9)]
    write_exactly(tmp_path / "a.mkv", iter(shades), fps=3)
    frame = middle_frame(tmp_path / "a.mkv", max_seconds=3, max_side=48)
    assert (frame.shape, int(frame[0, 0, 0])) == ((24, 48, 3), 80)
    assert middle_frame(tmp_path / "a.mkv", max_seconds=3, max_side=64).shape == (32, 64, 3)
    with pytest.raises(UnreadableError, match="longer than 2 seconds"):
        middle_frame(tmp_path / "a.mkv", max_seconds=2, max_side=64)


def test_frames_that_all_show_at_one_time_are_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(100_000))
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr0"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24").reformat(format="bgr0")
        for _ in range(1100):
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UnreadableError, match="1000 frames a second"):
        list(read_frames(path, fps=16, width=16, height=16))


def test_a_list_of_other_files_is_no_video(tmp_path: Path) -> None:
    write_exactly(tmp_path / "a.mkv", iter([halves(16, 16)]), fps=3)
    (tmp_path / "list").write_text("ffconcat version 1.0\nfile a.mkv\n")
    with pytest.raises(UnreadableError):
        list(read_frames(tmp_path / "list", fps=3, width=16, height=16))

"""Fragments: what a player is told, what it sees, and that a fragment depends on nothing but its own frames."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from numpy.typing import NDArray

from serving.media.fmp4 import CODECS, Codec, EncodedFragment, codec_string, encode_fragment, remux_to_mp4

FPS = 16
CHUNKS = [(0, 9), (9, 21), (21, 33), (33, 37)]
BT709 = 1


@pytest.fixture(scope="module")
def clip() -> NDArray[np.uint8]:
    """A disc that crosses a shaded floor, with a little grain: `[37, 64, 96, 3]`."""
    y, x = np.mgrid[0:64, 0:96].astype(np.float32)
    frames = np.empty((37, 64, 96, 3), np.float32)
    for index, frame in enumerate(frames):
        frame[:] = np.stack([60 + y, 90 + y, 160 - x / 2], axis=-1)
        coverage = np.clip(15 - np.hypot(x - 12 - 2 * index, y - 34), 0, 1)[..., None]
        frame[:] = frame * (1 - coverage) + np.array([210, 70, 50], np.float32) * coverage
    grain = np.random.default_rng(0).normal(0, 1.5, (*frames.shape[:3], 1))
    return np.clip(frames + grain, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def encoded(clip: NDArray[np.uint8]) -> list[EncodedFragment]:
    return [
        encode_fragment(clip[start:stop], fps=FPS, index=index, first_frame=start)
        for index, (start, stop) in enumerate(CHUNKS)
    ]


def decode(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def rgb(frame: av.VideoFrame) -> NDArray[np.float64]:
    """As a player that believes the colour tags shows it."""
    shown = frame.reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND,
    )
    return shown.to_ndarray().astype(np.float64)


def psnr(seen: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    """In dB, of 8-bit values."""
    return float(10 * np.log10(255**2 / np.mean((seen.astype(np.float64) - expected) ** 2)))


def boxes(data: bytes) -> list[bytes]:
    kinds, offset = [], 0
    while offset < len(data):
        kinds.append(data[offset + 4 : offset + 8])
        offset += int.from_bytes(data[offset : offset + 4], "big")
    assert offset == len(data)
    return kinds


@pytest.mark.parametrize("count", range(1, len(CHUNKS) + 1))
def test_every_prefix_decodes_to_exactly_the_frames_sent(encoded: list[EncodedFragment], count: int) -> None:
    prefix = encoded[0].init + b"".join(fragment.data for fragment in encoded[:count])
    av.logging.set_level(av.logging.WARNING)
    try:
        with av.logging.Capture(local=False) as complaints:
            frames = decode(prefix)
    finally:
        av.logging.set_level(None)
    assert [frame.pts * frame.time_base * FPS for frame in frames] == list(range(CHUNKS[count - 1][1]))
    assert {frame.duration * frame.time_base for frame in frames} == {Fraction(1, FPS)}
    assert complaints == []


def test_a_late_viewer_gets_the_right_times(encoded: list[EncodedFragment]) -> None:
    frames = decode(encoded[0].init + encoded[2].data + encoded[3].data)
    assert [frame.pts * frame.time_base * FPS for frame in frames] == list(range(21, 37))


def test_the_bytes_depend_on_nothing_that_came_before(clip: NDArray[np.uint8], encoded: list[EncodedFragment]) -> None:
    for index in reversed(range(len(CHUNKS))):
        start, stop = CHUNKS[index]
        again = encode_fragment(clip[start:stop].copy(), fps=FPS, index=index, first_frame=start)
        assert again == encoded[index]


def test_the_init_segment_is_the_same_for_every_fragment_of_a_video(encoded: list[EncodedFragment]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    single = np.zeros((1, 64, 96, 3), np.uint8)
    others = [
        encode_fragment(noise, fps=FPS, index=700, first_frame=8400),
        encode_fragment(single, fps=FPS, index=4, first_frame=37),
    ]
    assert len({fragment.init for fragment in [*encoded, *others]}) == 1


def test_boxes_and_sequence_numbers(encoded: list[EncodedFragment]) -> None:
    assert boxes(encoded[0].init) == [b"ftyp", b"moov"]
    for index, fragment in enumerate(encoded):
        assert boxes(fragment.data) == [b"moof", b"mdat"]
        header = fragment.data.index(b"mfhd")
        assert int.from_bytes(fragment.data[header + 8 : header + 12], "big") == index + 1


def test_nothing_names_a_library_version(encoded: list[EncodedFragment]) -> None:
    written = encoded[0].init + b"".join(fragment.data for fragment in encoded)
    for name in (b"x264", b"Lavf", b"Lavc"):
        assert name not in written


def test_one_key_frame_a_fragment_even_when_every_frame_is_a_cut() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
    fragments = [encode_fragment(noise[k : k + 24], fps=FPS, index=k // 24, first_frame=k) for k in (0, 24)]
    with av.open(io.BytesIO(fragments[0].init + fragments[0].data + fragments[1].data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
    assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 24]
    assert all(packet.pts == packet.dts for packet in packets)


def test_a_video_of_one_frame() -> None:
    fragment = encode_fragment(np.full((1, 32, 32, 3), 200, np.uint8), fps=FPS, index=0, first_frame=0)
    assert len(decode(fragment.init + fragment.data)) == 1


def test_colours_are_tagged_bt709_limited(encoded: list[EncodedFragment]) -> None:
    colr = encoded[0].init.index(b"colrnclx") + 8
    assert [int.from_bytes(encoded[0].init[colr + k : colr + k + 2], "big") for k in (0, 2, 4)] == [BT709] * 3
    frame = decode(encoded[0].init + encoded[0].data)[0]
    assert frame.colorspace == BT709
    assert frame.color_range == ColorRange.MPEG
    assert frame.color_primaries == ColorPrimaries.BT709
    assert frame.color_trc == ColorTrc.BT709


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (30, 140, 90)])
def test_colours_are_converted_with_the_matrix_that_the_tags_name(color: tuple[int, int, int]) -> None:
    fragment = encode_fragment(np.full((2, 32, 32, 3), color, np.uint8), fps=FPS, index=0, first_frame=0)
    planes = [np.frombuffer(plane, np.uint8)[0] for plane in decode(fragment.init + fragment.data)[0].planes]
    red, green, blue = (value / 255 for value in color)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # ITU-R BT.709-6, 3.2 and 3.3
    expected = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748]
    assert np.abs(np.array(planes, float) - expected).max() <= 1.5


def test_the_picture_is_clean(clip: NDArray[np.uint8], encoded: list[EncodedFragment]) -> None:
    frames = decode(encoded[0].init + b"".join(fragment.data for fragment in encoded))
    luma = 16 + 219 * (clip / 255) @ np.array([0.2126, 0.7152, 0.0722])
    for frame, pixels, expected in zip(frames, clip, luma, strict=True):
        assert psnr(np.frombuffer(frame.planes[0], np.uint8).reshape(64, -1)[:, :96], expected) > 42
        # Half of the colour's resolution is gone in 4:2:0, whatever the encoder does: at QP 1 this is 35.
        assert psnr(rgb(frame), pixels) > 33
        assert np.abs((rgb(frame) - pixels).mean(axis=(0, 1))).max() < 1


def test_the_codec_string_is_the_one_browsers_want(encoded: list[EncodedFragment]) -> None:
    assert codec_string(encoded[0].init) == "avc1.64000A"
    hd = encode_fragment(np.zeros((1, 720, 1280, 3), np.uint8), fps=24, index=0, first_frame=0)
    assert codec_string(hd.init) == "avc1.64001F"
    with pytest.raises(ValueError, match="init segment"):
        codec_string(encoded[0].data[:64])


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "uint8"),
        (np.zeros((32, 32, 3), np.uint8), "uint8"),
        (np.zeros((0, 32, 32, 3), np.uint8), "uint8"),
        (np.zeros((2, 31, 32, 3), np.uint8), "even"),
    ],
)
def test_frames_that_cannot_be_encoded_are_refused(frames: NDArray[np.uint8], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_fragment(frames, fps=FPS, index=0, first_frame=0)


def test_remux_keeps_every_packet_and_the_exact_duration(encoded: list[EncodedFragment], tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    remux_to_mp4(encoded[0].init, (fragment.data for fragment in encoded), path)
    data = path.read_bytes()
    assert boxes(data)[:2] == [b"ftyp", b"moov"]
    assert b"moof" not in data
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base == Fraction(37, FPS)
        assert stream.average_rate == FPS
        assert stream.frames == 37
        remuxed = [bytes(packet) for packet in container.demux(stream) if packet.dts is not None]
    streamed = encoded[0].init + b"".join(fragment.data for fragment in encoded)
    with av.open(io.BytesIO(streamed)) as container:
        assert remuxed == [bytes(packet) for packet in container.demux(video=0) if packet.dts is not None]
    assert [frame.pts * frame.time_base * FPS for frame in decode(data)] == list(range(37))


def test_remux_is_deterministic_and_leaves_nothing_half_written(encoded: list[EncodedFragment], tmp_path: Path) -> None:
    def broken() -> object:
        yield encoded[0].data
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        remux_to_mp4(encoded[0].init, broken(), tmp_path / "broken.mp4")  # type: ignore[arg-type]  # never yields
    assert list(tmp_path.iterdir()) == []
    for name in ("one.mp4", "two.mp4"):
        remux_to_mp4(encoded[0].init, [fragment.data for fragment in encoded], tmp_path / name)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_keeps_what_readers_count_on(codec: Codec, clip: NDArray[np.uint8], tmp_path: Path) -> None:
    """One key frame, at the start; exact times; the same bytes again; tags; a name; and about the same picture."""

    def encode(index: int) -> EncodedFragment:
        start, stop = CHUNKS[index]
        return encode_fragment(clip[start:stop], fps=FPS, index=index, first_frame=start, codec=codec)

    fragments = [encode(index) for index in range(len(CHUNKS))]
    assert encode(2) == fragments[2]
    (init,) = {fragment.init for fragment in fragments}
    name = {"h264": "avc1.64000A", "av1": "av01.0.00M.08", "vp9": "vp09.00.10.08"}[codec]
    assert codec_string(init) == name
    whole = init + b"".join(fragment.data for fragment in fragments)
    frames = decode(whole)
    assert [round(frame.time * FPS) for frame in frames] == list(range(37))
    assert [n for n, frame in enumerate(frames) if frame.key_frame] == [start for start, _ in CHUNKS]
    assert min(psnr(rgb(frame), expected) for frame, expected in zip(frames, clip, strict=True)) > 32
    for frame in frames:
        assert (int(frame.colorspace), frame.color_range) == (BT709, ColorRange.MPEG)
    # A late viewer begins anywhere, and the whole becomes one file.
    assert len(decode(init + fragments[2].data)) == 12
    remux_to_mp4(init, [fragment.data for fragment in fragments], tmp_path / "whole.mp4")
    with av.open(str(tmp_path / "whole.mp4")) as container:
        assert container.duration == 37 * 1_000_000 // FPS
        assert sum(1 for _ in container.decode(video=0)) == 37

"""Playlists: what RFC 8216bis demands of them, for every length that a log can have."""

from __future__ import annotations

import re

import pytest

from serving.media.hls import SEGMENT_SECONDS, Timeline, media_playlist, multivariant_playlist

FPS = 16
FRAMES = (9, 12, 12, 12, 12, 12, 12, 4)
CHUNK_SECONDS = 12 / FPS


def timeline(count: int, *, ended: bool = False) -> Timeline:
    return Timeline(FRAMES[:count], FPS, CHUNK_SECONDS, ended)


def durations(playlist: str) -> list[float]:
    return [float(found) for found in re.findall(r"^#EXTINF:([\d.]+),$", playlist, re.MULTILINE)]


def test_segments_are_runs_of_parts_that_are_long_enough() -> None:
    segments = timeline(8).segments()
    assert [(s.first, s.stop, s.frames, s.whole) for s in segments] == [
        (0, 1, 9, True),
        (1, 4, 36, True),
        (4, 7, 36, True),
        (7, 8, 4, False),
    ]
    assert timeline(8, ended=True).segments()[-1].whole


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("count", range(1, 9))
def test_every_playlist_keeps_the_rules(count: int, ended: bool) -> None:
    text = media_playlist(timeline(count, ended=ended))
    lines = text.splitlines()
    assert lines[0] == "#EXTM3U"
    assert text.endswith("\n")
    target = int(re.search(r"^#EXT-X-TARGETDURATION:(\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]  # it is there
    # 4.4.3.1: rounded to the nearest integer, no segment is longer.
    assert all(round(seconds) <= target for seconds in durations(text))
    for tag in ("#EXT-X-VERSION", "#EXT-X-TARGETDURATION", "#EXT-X-MAP", "#EXT-X-PLAYLIST-TYPE"):
        assert sum(line.startswith(tag + ":") for line in lines) == 1
    uris = [line for line in lines if not line.startswith("#")]
    assert uris == [f"segments/{index}.m4s" for index in range(len(uris))]
    assert len(durations(text)) == len(uris)

    if ended:
        assert lines[-1] == "#EXT-X-ENDLIST"
        assert "#EXT-X-PLAYLIST-TYPE:VOD" in lines
        assert "#EXT-X-PART" not in text
        assert "PRELOAD" not in text
        assert sum(durations(text)) == pytest.approx(sum(FRAMES[:count]) / FPS, abs=1e-4)
        return
    assert "#EXT-X-PLAYLIST-TYPE:EVENT" in lines
    part_target = float(re.search(r"^#EXT-X-PART-INF:PART-TARGET=([\d.]+)$", text, re.MULTILINE)[1])  # type: ignore[index]  # it is there
    parts = re.findall(r'^#EXT-X-PART:DURATION=([\d.]+),URI="parts/(\d+).m4s",INDEPENDENT=YES$', text, re.MULTILINE)
    assert [int(index) for _, index in parts] == list(range(count))
    # 4.4.4.9: no part is longer than the part target.
    assert all(float(seconds) <= part_target for seconds, _ in parts)
    control = next(line for line in lines if line.startswith("#EXT-X-SERVER-CONTROL:"))
    assert "CAN-BLOCK-RELOAD=YES" in control
    # 4.4.3.8: at least twice (and better three times) the part target; three times the target duration.
    assert float(re.search(r"PART-HOLD-BACK=([\d.]+)", control)[1]) >= 3 * part_target - 1e-6  # type: ignore[index]  # it is there
    assert float(re.search(r",HOLD-BACK=([\d.]+)", control)[1]) >= 3 * target  # type: ignore[index]  # it is there
    assert lines[-1] == f'#EXT-X-PRELOAD-HINT:TYPE=PART,URI="parts/{count}.m4s"'


def test_an_event_playlist_only_grows() -> None:
    """4.4.3.5: nothing that was in it is changed or removed, but for parts and what is said of the next one."""
    before: list[str] = []
    for count in range(1, 9):
        lines = [line for line in media_playlist(timeline(count)).splitlines() if "PART" not in line]
        lines = [line for line in lines if "PRELOAD" not in line]
        assert lines[: len(before)] == before
        before = lines
    grown = [line for line in before if not line.startswith("#EXT-X-PLAYLIST-TYPE")]
    ended = media_playlist(timeline(8, ended=True)).splitlines()
    assert [line for line in ended if not line.startswith("#EXT-X-PLAYLIST-TYPE")][: len(grown)] == grown


@pytest.mark.parametrize(
    ("sequence", "part", "there"),
    [
        (0, None, True),
        (0, 0, True),
        (0, 1, True),  # the first of the next segment
        (1, None, True),
        (1, 2, True),
        (2, None, False),
        (2, 0, True),
        (2, 1, False),
        (3, 0, False),
    ],
)
def test_what_a_player_may_wait_for(sequence: int, part: int | None, there: bool) -> None:
    assert timeline(5).has(sequence, part) is there
    assert timeline(5, ended=True).has(sequence, part)


def test_segments_last_as_long_as_they_should() -> None:
    first, *whole = [segment for segment in timeline(8).segments() if segment.whole]
    assert first.frames == FRAMES[0]
    assert all(SEGMENT_SECONDS <= s.frames / FPS < SEGMENT_SECONDS + CHUNK_SECONDS for s in whole)


def test_the_multivariant_playlist_says_what_the_video_is() -> None:
    text = multivariant_playlist(
        codec="avc1.64000C", width=128, height=96, fps=16, peak_bits=200_000, average_bits=150_000
    )
    about, uri = text.splitlines()[-2:]
    assert about == (
        "#EXT-X-STREAM-INF:BANDWIDTH=200000,AVERAGE-BANDWIDTH=150000,"
        'CODECS="avc1.64000C",RESOLUTION=128x96,FRAME-RATE=16.000'
    )
    assert uri == "media.m3u8"


def test_parts_are_named_near_the_end_alone() -> None:
    """4.4.4.9: those more than three target durations from the end need not be there; what is left is in order."""
    text = media_playlist(Timeline((9, *[12] * 99), FPS, CHUNK_SECONDS, ended=False))
    named = [int(index) for index in re.findall(r'URI="parts/(\d+).m4s",INDEPENDENT', text)]
    assert named == list(range(named[0], 100))
    assert 3 * 3 <= (100 - named[0]) * CHUNK_SECONDS < 3 * 3 + 2 * SEGMENT_SECONDS + CHUNK_SECONDS
    assert len(durations(text)) == 33 + 1

"""Fragments and events from bytes in pieces of any size, over any number of connections."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import FRAGMENTS, WHOLE

from serving.client import Chunk, RushesError, VideoFailed
from serving.client.wire import EventReader, FragmentReader
from serving.media.trailer import error_box


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:stop] for start, stop in pairwise(edges)]


def read(reader: FragmentReader, parts: list[bytes]) -> list[Chunk]:
    return [chunk for part in parts for chunk in reader.feed(part)]


@given(st.lists(st.integers(0, 1 << 20), max_size=12))
def test_chunks_come_whole_however_the_bytes_are_cut(cuts: list[int]) -> None:
    chunks = read(FragmentReader(), pieces(WHOLE, cuts))
    assert [(c.index, c.init, c.data) for c in chunks] == [(i, f.init, f.data) for i, f in enumerate(FRAGMENTS)]


@given(st.integers(0, len(WHOLE)), st.booleans())
def test_another_connection_goes_on_where_the_first_was_cut(cut: int, from_the_start: bool) -> None:
    """A server may answer with more than was asked for: nothing comes twice."""
    reader = FragmentReader()
    chunks = read(reader, [WHOLE[:cut]])
    reader.reconnected()
    missing = FRAGMENTS[0 if from_the_start else reader.next_index :]
    chunks += read(reader, [FRAGMENTS[0].init + b"".join(fragment.data for fragment in missing)])
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]


def test_a_chunk_has_its_frames() -> None:
    (chunk,) = FragmentReader(3).feed(FRAGMENTS[0].init + FRAGMENTS[3].data)
    assert chunk.frames().shape == (12, 64, 64, 3)
    assert np.abs(chunk.frames()[:, 8:56, 8:56, 2].mean((1, 2)) - 5 * np.arange(33, 45)).max() < 4


def test_a_gap_is_an_error() -> None:
    with pytest.raises(RushesError, match="fragment 2 came instead of 0"):
        list(FragmentReader().feed(FRAGMENTS[0].init + FRAGMENTS[2].data))


@pytest.mark.parametrize("data", [b"<html>busy</html>", b"\0\0\0\x01moof"])
def test_what_is_no_video_is_an_error(data: bytes) -> None:
    with pytest.raises(RushesError):
        list(FragmentReader().feed(data))


def test_the_box_that_ends_a_failed_video() -> None:
    reader = FragmentReader()
    box = error_box("generation_failed", "out of memory: 3 GiB \N{EM DASH} more")
    assert len(read(reader, [WHOLE, box[:-1]])) == 4
    with pytest.raises(VideoFailed, match="out of memory: 3 GiB \N{EM DASH} more") as failure:
        list(reader.feed(box[-1:]))
    assert failure.value.code == "generation_failed"


def test_events_from_lines() -> None:
    reader = EventReader()
    lines = [
        ": hello",
        "",
        "id: 4",
        "event: chunk",
        'data: {"index": 4}',
        "",
        "event:progress",
        'data:{"progress":7}',
        "",
    ]
    events = [event for line in lines if (event := reader.feed(line)) is not None]
    assert [(e.name, e.data, e.id) for e in events] == [
        ("chunk", {"index": 4}, "4"),
        ("progress", {"progress": 7}, None),
    ]
    assert reader.last_id == "4"


def test_half_an_event_is_none() -> None:
    reader = EventReader()
    reader.feed('data: {"index":')
    reader.reconnected()
    assert reader.feed("") is None

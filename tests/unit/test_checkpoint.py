"""A checkpoint: what is kept of a video in the making, what of it is believed, and that going on from it is exact."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from serving.jobs.artifacts import CHECKPOINTS, Artifacts, checkpoint_key
from serving.jobs.checkpoint import BadPiece, Checkpoint, Piece, identity_of, pack, unpack
from serving.jobs.fragment_log import FragmentLog, LogError, LogWriter
from serving.jobs.keeper import Keeper
from serving.jobs.store import SqlVideoStore, StaleFence, Video, new_video_id
from serving.jobs.sweeper import Sweeper
from serving.pipeline.stages import VideoSpec

SPEC = VideoSpec("a ball", "", 64, 64, 17, 7, 4, 3.0)
IDENTITY = identity_of("bundle", asdict(SPEC))


def latents(value: float) -> np.ndarray:
    return np.random.default_rng(int(value)).standard_normal((4, 3, 2, 2), dtype=np.float32)


@pytest.fixture
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path)


async def keeper_of(artifacts: Artifacts, video_id: str, identity: str = IDENTITY, fence: int = 1) -> Keeper:
    writer = await FragmentLog.create(artifacts.videos_dir, video_id, fence=fence)
    return Keeper(artifacts, video_id, identity, writer.check_fence)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    chunks = len(one.chunks) == len(other.chunks)
    chunks = chunks and all(np.array_equal(a, b) for a, b in zip(one.chunks, other.chunks, strict=True))
    states = (one.state is None) == (other.state is None)
    states = states and (one.state is None or np.array_equal(one.state, other.state))  # type: ignore[arg-type]  # or both None
    return chunks and states and (one.whole, one.step) == (other.whole, other.step)


@pytest.mark.parametrize("piece", [Piece(latents(1), 3, last=True), Piece(latents(2)[None], 5)])
def test_a_piece_comes_back_to_the_bit(piece: Piece) -> None:
    found = unpack(pack(piece, IDENTITY), IDENTITY)
    np.testing.assert_array_equal(found.array, piece.array)
    assert (found.number, found.last) == (piece.number, piece.last)


def test_no_damaged_piece_is_believed() -> None:
    data = pack(Piece(latents(1), 3), IDENTITY)
    damaged = [data[:n] for n in range(0, len(data), 7)]
    damaged += [data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :] for n in range(0, len(data), 11)]
    damaged += [data + b"\0", data[1:], b"\n" * 100, b"{}" + data]
    for bad in damaged:
        with pytest.raises(BadPiece):
            unpack(bad, IDENTITY)


def test_a_piece_with_a_wrong_header_is_not_believed() -> None:
    """Somebody else's program might write a hash that is right."""
    from hashlib import sha256

    for header in (b"", b"[]", b"{}", b'{"identity": "x"}', b'{"identity": 1, "number": "a", "last": 0, "shape": [1]}'):
        rest = header + b"\n" + bytes(4)
        with pytest.raises(BadPiece):
            unpack(sha256(rest).hexdigest().encode() + b"\n" + rest, "x")


def test_the_identity_tells_models_and_requests_apart() -> None:
    from dataclasses import replace

    others = [
        identity_of("other", asdict(SPEC)),
        *(
            identity_of("bundle", asdict(replace(SPEC, **{name: value})))
            for name, value in (("seed", 8), ("frames", 33))
        ),
        identity_of("bundle", asdict(replace(SPEC, revised_prompt="a red ball"))),
    ]
    assert len({IDENTITY, *others}) == 5
    assert identity_of("bundle", asdict(SPEC)) == IDENTITY
    data = pack(Piece(latents(1), 0), IDENTITY)
    for other in others:
        with pytest.raises(BadPiece, match="another model or request"):
            unpack(data, other)


@pytest.mark.parametrize("url", [None, "memory"])
async def test_what_was_kept_is_found_again(tmp_path: Path, url: str | None) -> None:
    artifacts = Artifacts(tmp_path, url and f"memory://{uuid.uuid4().hex}")
    video_id = new_video_id()
    keeper = await keeper_of(artifacts, video_id)
    assert same(await keeper.begun(0), Checkpoint())
    expected = Checkpoint()
    for index in range(3):
        keeper.keep_chunk(0, Piece(latents(index), index))
        expected = expected.with_chunk(latents(index), last=False)
    for step in (5, 10):
        keeper.keep_state(1, Piece(latents(step)[None], step))
    await keeper.close()
    found = await keeper_of(artifacts, video_id, fence=2)
    assert same(await found.begun(0), expected)
    assert same(await found.begun(1), Checkpoint(state=latents(10)[None], step=10))
    found.keep_chunk(0, Piece(latents(3), 3, last=True))
    await found.close()
    again = await found.begun(0)
    assert (len(again.chunks), again.whole) == (4, True)
    assert same(await (await keeper_of(artifacts, video_id, "other", fence=3)).begun(0), Checkpoint())
    artifacts.remove_video(video_id)
    assert same(await found.begun(0), Checkpoint())


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "another's", "misplaced"])
async def test_a_bad_piece_ends_what_is_believed(artifacts: Artifacts, tmp_path: Path, damage: str) -> None:
    video_id = new_video_id()
    keeper = await keeper_of(artifacts, video_id)
    for index in range(4):
        keeper.keep_chunk(0, Piece(latents(index), index, last=index == 3))
    await keeper.close()
    directory = tmp_path / checkpoint_key(video_id)
    second = directory / "0-00000001"
    if damage == "gone":
        second.unlink()
    elif damage == "misplaced":
        second.write_bytes((directory / "0-00000000").read_bytes())
    else:
        good = second.read_bytes()
        second.write_bytes({"empty": b"", "cut": good[:-1], "another's": pack(Piece(latents(1), 1), "x")}[damage])
    found = await keeper.begun(0)
    assert same(found, Checkpoint().with_chunk(latents(0), last=False))


async def test_an_attempt_that_was_overtaken_keeps_nothing(artifacts: Artifacts) -> None:
    video_id = new_video_id()
    old = await keeper_of(artifacts, video_id)
    await FragmentLog.create(artifacts.videos_dir, video_id, fence=2)
    old.keep_chunk(0, Piece(latents(0), 0))
    await old.close()
    assert (old.kept, artifacts.names(CHECKPOINTS)) == (0, [])


async def test_a_file_store_that_fails_for_a_moment_loses_nothing_and_holds_nothing_up(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    video_id, put, failures = new_video_id(), artifacts.put_bytes, iter(range(3))
    keeper = await keeper_of(artifacts, video_id)

    def failing(key: str, data: bytes) -> None:
        for _ in failures:
            raise OSError("away")
        put(key, data)

    monkeypatch.setattr(artifacts, "put_bytes", failing)
    for index in range(2):
        keeper.keep_chunk(0, Piece(latents(index), index))
    await keeper.close()
    assert (keeper.kept, len((await keeper.begun(0)).chunks)) == (2, 2)


async def test_only_the_newest_state_is_worth_the_time(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = await keeper_of(artifacts, new_video_id())
    for step in range(5, 500, 5):
        keeper.keep_state(0, Piece(latents(step)[None], step))
    await keeper.close()
    assert keeper.kept < 3
    assert (await keeper.begun(0)).step == 495


async def test_checkpoints_of_videos_that_have_ended_are_swept(artifacts: Artifacts, tmp_path: Path) -> None:
    store = SqlVideoStore(f"sqlite:///{tmp_path / 'videos.db'}", max_attempts=1, max_lapses=1)
    ids = {}
    for name in ("failed", "running", "queued", "gone"):
        video = Video(new_video_id(), "mini", "a ball", "2", "128x128")
        ids[name] = video.id
        keeper = await keeper_of(artifacts, video.id)
        keeper.keep_chunk(0, Piece(latents(0), 0))
        await keeper.close()
        if name != "gone":
            await store.create(video)
        if name in ("failed", "running"):
            claimed = await store.claim("runner", 60)
            assert claimed is not None
            if name == "failed":
                await store.fail(video.id, claimed.fence, "code", "message")
    await Sweeper(store, artifacts).sweep()
    assert artifacts.names(CHECKPOINTS) == sorted([ids["running"], ids["queued"]])


async def test_a_log_tells_what_it_was_made_from(tmp_path: Path) -> None:
    video_id = new_video_id()

    async def opened(fence: int, origin: str | None) -> LogWriter:
        return await FragmentLog.create(tmp_path, video_id, fence=fence, origin=origin)

    await opened(1, "a")
    writer = await opened(2, "b")  # nothing was shown yet
    await writer.append(0, 0, 9, b"init", b"data")
    assert (writer.trusted, (await opened(3, "b")).trusted, (await opened(4, None)).trusted) == (0, 1, 0)
    with pytest.raises(LogError, match="the model was changed"):
        await opened(5, "a")
    with pytest.raises(StaleFence):
        writer.check_fence()
    (tmp_path / video_id / "origin").unlink()  # an older version's log: its bytes will be compared
    assert (await opened(6, "a")).trusted == 0


async def test_waiting_for_the_file_store_leaves_asyncios_threads_alone(artifacts: Artifacts) -> None:
    import threading

    gate = threading.Event()
    waiting = [asyncio.create_task(artifacts.in_thread(gate.wait)) for _ in range(40)]
    assert await asyncio.to_thread(lambda: "free") == "free"
    gate.set()
    await asyncio.gather(*waiting)

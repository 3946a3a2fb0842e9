"""Interactive sessions: the real protocol on a real socket, over a real (tiny) causal bundle, without Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pipelines import idle
from service import Service, WholeService, served, until
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from models.bundle import Bundle
from serving.api.places import Places
from serving.client import ApiError, AsyncRealtime, AsyncRushes, LiveChunk, Rushes
from serving.config import RealtimeConfig
from serving.media.fmp4 import codec_string
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.stages import DenoiseEvent, DenoiseRequest, Fragment, LatentChunk, LostSession, VideoSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT, OTHER = "a red ball bouncing on a sand floor at sunset", "a blue cube"
ASKED: dict[str, Any] = {"seed": 7, "size": "64x64", "num_inference_steps": 2}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tiny_causal_bundle: Bundle) -> AsyncIterator[LocalPipeline]:
    async with LocalPipeline.open(tiny_causal_bundle) as opened:
        yield opened


@pytest.fixture
def service(tiny_causal_bundle: Bundle, pipeline: LocalPipeline, tmp_path: Path) -> WholeService:
    made = WholeService(tiny_causal_bundle, pipeline, tmp_path)
    made.realtime = RealtimeConfig(buffer_seconds=100)  # what is made ahead of a change fits into a video
    return made


@asynccontextmanager
async def session(service: WholeService, prompt: str = PROMPT, **settings: Any) -> AsyncIterator[AsyncRealtime]:
    async with (
        service.running() as client,
        AsyncRushes(str(client.base_url)) as rushes,
        rushes.realtime(prompt, **ASKED | settings) as opened,
    ):
        yield opened


async def first(chunks: AsyncRealtime, count: int) -> list[LiveChunk]:
    taken: list[LiveChunk] = []
    async with aclosing(chunks.__aiter__()) as reading:
        async for chunk in reading:
            taken.append(chunk)
            if len(taken) == count:
                break
    return taken


async def made(pipeline: LocalPipeline, bundle: Bundle, seconds: int, **asked: Any) -> list[Fragment]:
    """The same as an ordinary video, by the decoder that a session has unless it asks for the other."""
    fragments: list[Fragment] = []

    async def sink(fragment: Fragment) -> None:
        fragments.append(fragment)

    settings = ASKED | {"rewrite_prompt": False, "decoder": "tiny"} | asked
    spec = make_spec(bundle.manifest, PROMPT, seconds=seconds, **settings)
    await pipeline.generate(spec, sink)
    return fragments


async def test_a_session_is_the_video_that_it_would_be_and_a_new_prompt_shows_in_the_next_chunk(
    service: WholeService, pipeline: LocalPipeline, tiny_causal_bundle: Bundle
) -> None:
    async with session(service) as live:
        assert live.session["fps"] == 16
        chunks = await first(live, 3)
        await live.change_prompt(OTHER)
        while not chunks[-1].prompt_changed:
            chunks += await first(live, 1)
        chunks += await first(live, 2)
    # The first chunk under each prompt says so, and no other.
    changed = [chunk.index for chunk in chunks if chunk.prompt_changed]
    assert changed == [0, chunks[-3].index]
    assert [chunk.prompt for chunk in chunks] == [PROMPT] * changed[1] + [OTHER] * 3
    assert [chunk.about["prompt_number"] for chunk in chunks] == [0] * changed[1] + [1] * 3
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [c.about["first_frame"] for c in chunks[1:]] == [
        c.about["first_frame"] + c.about["frames"] for c in chunks[:-1]
    ]
    assert all(c.about["sha256"] == sha256(c.data).hexdigest() for c in chunks)
    assert all(c.about["bytes"] == len(c.data) for c in chunks)
    assert chunks[1].frames().shape == (12, 64, 64, 3)
    # And it is the very chunk whose frames are of the new prompt: as a video with that scene has them.
    scenes = [{"start_seconds": chunks[changed[1]].about["start_seconds"], "prompt": OTHER}]
    seconds = 2 + int(chunks[-1].about["start_seconds"])
    reference = await made(pipeline, tiny_causal_bundle, seconds, scene_prompts=scenes)
    assert [chunk.data for chunk in chunks] == [fragment.data for fragment in reference[: len(chunks)]]
    assert chunks[0].init == reference[0].init
    await until(lambda: idle(pipeline))


async def test_a_paused_session_makes_nothing_and_goes_on_where_it_was(
    service: WholeService, pipeline: LocalPipeline
) -> None:
    async with session(service) as live:
        chunks = await first(live, 2)
        await live.pause()
        # With so large a buffer there would always be something to do.
        await until(lambda: pipeline.denoiser.outstanding_tokens == 0)
        assert pipeline.denoiser.sessions == 1
        await live.change_prompt(OTHER)
        await live.resume()
        while chunks[-1].prompt != OTHER:
            chunks += await first(live, 1)
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        await live.stop()
        assert [chunk.prompt async for chunk in live].count(PROMPT) == 0
        assert live.end_reason == "stopped"
    await until(lambda: idle(pipeline))


async def test_nobody_is_worked_for_who_doesnt_acknowledge(service: WholeService, pipeline: LocalPipeline) -> None:
    service.realtime = RealtimeConfig(buffer_seconds=2)
    async with service.running() as client, opened(str(client.base_url)) as socket:
        await say(socket, "session.create", session={"prompt": PROMPT, **ASKED})
        seen = [await fragment(socket) for _ in range(3)]
        # 2 s are the chunks that begin at 0, 9/16 and 21/16 s.
        assert [event["index"] for event in seen] == [0, 1, 2]
        await until(lambda: pipeline.denoiser.outstanding_tokens == 0)
        await say(socket, "fragment.ack", index=9)
        assert (await heard(socket, "error"))["error"]["param"] == "index"
        await say(socket, "fragment.ack", index=1)
        assert (await fragment(socket))["index"] == 3


async def test_a_dropped_connection_ends_the_session(service: WholeService, pipeline: LocalPipeline) -> None:
    async with service.running() as client, opened(str(client.base_url)) as socket:
        await say(socket, "session.create", session={"prompt": PROMPT, **ASKED})
        await fragment(socket)
        assert not idle(pipeline)
        socket.transport.abort()  # no goodbye
        await until(lambda: idle(pipeline))
        assert pipeline.denoiser.outstanding_tokens == 0


async def test_whoever_leaves_with_much_unread_need_not_wait(service: WholeService, pipeline: LocalPipeline) -> None:
    """websockets reads no more when 16 messages wait in its queue, and the answer to a goodbye comes after them."""
    decoded: list[int] = []

    class Counting:
        close = pipeline.decoder.close

        async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk) -> Fragment:
            decoded.append(chunk.index)
            return await pipeline.decoder.decode(video_id, spec, chunk)

    service.stages["decoder"] = Counting()
    async with session(service):
        await until(lambda: len(decoded) > 12)
        leaves = time.monotonic()
    assert time.monotonic() - leaves < 5


async def test_without_asyncio(service: WholeService) -> None:
    def use(url: str) -> list[str]:
        prompts = []
        with Rushes(url) as rushes, rushes.realtime(PROMPT, codec="vp9", **ASKED) as live:
            for chunk in live:
                prompts.append(chunk.prompt)
                assert codec_string(chunk.init) == "vp09.00.10.08"
                assert len(chunk.frames()) == chunk.about["frames"]
                if chunk.index == 0:
                    live.change_prompt(OTHER)
                if chunk.prompt == OTHER:
                    live.stop()
                    break
        return prompts

    async with service.running() as client:
        prompts = await asyncio.to_thread(use, str(client.base_url))
    assert (prompts[0], prompts[-1]) == (PROMPT, OTHER)


class Lossy:
    """A denoiser whose replica dies after each of some chunks."""

    def __init__(self, denoiser: Any, *chunks: int) -> None:
        self._denoiser, self._chunks = denoiser, set(chunks)
        self.steer = denoiser.steer

    async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseEvent, None]:
        async with aclosing(self._denoiser.denoise(request)) as events:
            async for event in events:
                yield event
                if isinstance(event, LatentChunk) and event.index in self._chunks:
                    self._chunks.discard(event.index)
                    raise LostSession("its replica is gone")


async def test_stages_that_lose_the_session_are_told_what_they_must_know(
    service: WholeService, pipeline: LocalPipeline, tiny_causal_bundle: Bundle
) -> None:
    """Exactly what would have come, while the window still has it all; and after that what comes is whole."""
    service.stages["denoiser"] = Lossy(pipeline.denoiser, 1, 6)
    async with session(service) as live:
        chunks = await first(live, 3)
        await pipeline.decoder.close(live.session["id"])
        chunks += await first(live, 6)
    assert [chunk.index for chunk in chunks] == list(range(9))
    assert [len(chunk.frames()) for chunk in chunks] == [9] + [12] * 8
    reference = await made(pipeline, tiny_causal_bundle, 6)
    assert [chunk.data for chunk in chunks[:6]] == [fragment.data for fragment in reference[:6]]


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[ClientConnection]:
    socket_url = f"{url.rstrip('/').replace('http', 'ws')}/v1/realtime"
    # What is unread in a queue that is full would hold up the close.
    async with connect(socket_url, proxy=None, max_queue=None, **options) as socket:
        yield socket


async def say(socket: ClientConnection, kind: str, **fields: Any) -> None:
    await socket.send(json.dumps({"type": kind, **fields}))


async def heard(socket: ClientConnection, *kinds: str) -> dict[str, Any]:
    while True:
        message = await socket.recv()
        if isinstance(message, str) and (event := json.loads(message))["type"] in kinds:
            found: dict[str, Any] = event
            return found


async def fragment(socket: ClientConnection) -> dict[str, Any]:
    event = await heard(socket, "fragment")
    data = await socket.recv()
    assert isinstance(data, bytes)
    assert len(data) == event["bytes"]
    return event


async def test_only_so_many_sessions_at_a_time(service: WholeService) -> None:
    service.realtime = RealtimeConfig(max_sessions=1)
    async with (
        service.running() as client,
        opened(str(client.base_url)) as one,
        opened(str(client.base_url)) as two,
    ):
        await say(one, "session.create", session={"prompt": PROMPT, **ASKED})
        await heard(one, "session.created")
        await say(two, "session.create", session={"prompt": PROMPT}, event_id="mine")
        error = (await heard(two, "error"))["error"]
        assert (error["code"], error["event_id"]) == ("too_many_sessions", "mine")
        await say(one, "session.stop")
        assert (await heard(one, "session.ended"))["reason"] == "stopped"
        await one.wait_closed()
        await say(two, "session.create", session={"prompt": PROMPT, **ASKED})
        await heard(two, "session.created")


async def test_a_keys_limits_hold_for_sessions_and_videos_together(service: WholeService) -> None:
    """What is refused is never opened, and a session's place is free when it ends."""
    service.require_keys = True
    _, secret = service.storage.keys.create("me", max_unfinished=1)
    headers = {"Authorization": f"Bearer {secret}"}
    asked = {"prompt": PROMPT, **ASKED}
    async with service.running() as client:
        client.headers.update(headers)
        url = str(client.base_url)
        async with opened(url, additional_headers=headers) as one, opened(url, additional_headers=headers) as two:
            await say(one, "session.create", session=asked)
            await heard(one, "session.created")
            await say(two, "session.create", session=asked, event_id="mine")
            error = (await heard(two, "error"))["error"]
            assert (error["code"], error["event_id"]) == ("rate_limit_exceeded", "mine")
            assert (await heard(two, "session.ended"))["reason"] == "refused"
            await two.wait_closed()
            assert two.close_code == 1013
            refused = await client.post("/v1/videos", json=asked)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            async with AsyncRushes(url, api_key=secret) as rushes:
                with pytest.raises(ApiError, match="1 videos and sessions") as limited:
                    await rushes.realtime(**asked).__aenter__()
            assert limited.value.status == 429
            await say(one, "session.stop")
            await one.wait_closed()
        while (await client.post("/v1/videos", json=asked)).status_code != 200:
            pass  # its place is given back a moment after the connection's end


async def test_a_session_ends_with_its_chunk_in_hand_when_its_model_goes(
    service: WholeService, pipeline: LocalPipeline
) -> None:
    places = service.places = Places(4, service.storage.live)
    create: dict[str, Any] = {"session": {"prompt": PROMPT, **ASKED}}
    async with service.running() as client:
        url = str(client.base_url)
        async with opened(url) as playing, opened(url) as paused, opened(url) as late:
            await say(playing, "session.create", **create)
            await say(paused, "session.create", **create)
            await fragment(paused)
            await say(paused, "session.pause")
            assert (await fragment(playing))["index"] == 0
            await until(lambda: pipeline.denoiser.outstanding_tokens > 0)
            places.withdraw({"tiny": "model_replaced"})
            await say(late, "session.create", **create)
            assert (await heard(late, "error"))["error"]["code"] == "model_unavailable"
            indices = []
            for socket in (playing, paused):
                while (event := await heard(socket, "fragment", "session.ended"))["type"] == "fragment":
                    indices.append(event["index"])
                assert (event["reason"], "replaced" in event["message"]) == ("model_replaced", True)
                await socket.wait_closed()
                assert socket.close_code == 1012
            assert 1 in indices
            await until(lambda: idle(pipeline))


@pytest.mark.parametrize(("limits", "reason"), [({"idle_seconds": 0.2}, "idle"), ({"max_seconds": 0.2}, "too_long")])
async def test_a_session_ends_when_its_time_is_over(
    service: WholeService, pipeline: LocalPipeline, limits: dict[str, float], reason: str
) -> None:
    service.realtime = RealtimeConfig(**limits)
    async with service.running() as client, opened(str(client.base_url)) as socket:
        await say(socket, "session.create", session={"prompt": PROMPT, **ASKED})
        assert (await heard(socket, "session.ended"))["reason"] == reason
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 1000
        await until(lambda: idle(pipeline))


WRONG: list[tuple[Any, str | None, str]] = [
    ("{", None, "invalid_json"),
    ("[]", None, "invalid_type"),
    (b"{}", None, "invalid_type"),
    ('"' + "x" * (1 << 16) + '"', None, "event_too_large"),
    ({}, "type", "invalid_event_type"),
    ({"type": "session.begin"}, "type", "invalid_event_type"),
    ({"type": ["session.stop"]}, "type", "invalid_event_type"),
    ({"type": "session.pause"}, "type", "no_session"),
    ({"type": "session.create"}, "session", "missing_required_parameter"),
    ({"type": "session.create", "session": {}}, "session.prompt", "missing_required_parameter"),
    ({"type": "session.create", "session": {"prompt": " "}}, "session.prompt", "invalid_value"),
    ({"type": "session.create", "session": {"prompt": "a\0"}}, "session.prompt", "invalid_value"),
    ({"type": "session.create", "session": {"prompt": "a", "seconds": 1}}, "session.seconds", "unknown_parameter"),
    ({"type": "session.create", "session": {"prompt": "a", "size": "9x9"}}, "session.size", "invalid_value"),
    ({"type": "session.create", "session": {"prompt": "a", "codec": "hevc"}}, "session.codec", "invalid_value"),
    ({"type": "session.create", "session": {"prompt": "a", "cache": "all"}}, "session.cache", "invalid_value"),
    (
        {"type": "session.create", "session": {"prompt": "a", "guidance_cache": "all"}},
        "session.guidance_cache",
        "invalid_value",
    ),
    ({"type": "session.create", "session": {"prompt": "a", "lora": 1}}, "session.lora", "invalid_value"),
    ({"type": "session.create", "session": {"prompt": "a", "model": "x"}}, "session.model", "model_not_found"),
    ({"type": "session.create", "session": {"prompt": "a"}}, "session.model", "model_not_causal"),
]


async def test_what_is_wrong_with_an_event_is_said(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """And the connection is as good as before."""
    async with served(Service(tiny_bundle, tmp_path).api) as client, opened(str(client.base_url)) as socket:
        for event, param, code in WRONG:
            await socket.send(json.dumps(event) if isinstance(event, dict) else event)
            error = (await heard(socket, "error"))["error"]
            assert error.keys() == {"message", "type", "param", "code", "event_id"}
            said = error["param"], error["code"], error["type"]
            assert said == (param, code, "invalid_request_error"), event


async def test_a_stage_that_fails_is_said(service: WholeService, pipeline: LocalPipeline) -> None:
    class Broken(Lossy):
        async def denoise(self, request: DenoiseRequest) -> AsyncGenerator[DenoiseEvent, None]:
            raise ValueError("out of memory")
            yield

    service.stages["denoiser"] = Broken(pipeline.denoiser)
    with pytest.raises(ApiError, match="out of memory") as failed:
        async with session(service) as live:
            await first(live, 1)
    assert (failed.value.status, failed.value.code) == (500, "generation_failed")

    class Silent:
        async def encode(self, prompt: str) -> None:
            raise KeyError(prompt)

    service.stages["text_encoder"] = Silent()
    with pytest.raises(ApiError, match="made a mistake"):
        async with session(service):
            pass


async def test_the_client_raises_what_the_service_refuses(service: WholeService) -> None:
    with pytest.raises(ApiError) as refused:
        async with session(service, size="9x9"):
            pass
    assert refused.value.param == "session.size"
    async with session(service) as live:
        await live.change_prompt("")
        with pytest.raises(ApiError, match="must not be empty"):
            await first(live, 1000)
        await first(live, 1)


async def test_a_key_comes_in_a_header_or_as_a_subprotocol(tiny_bundle: Bundle, tmp_path: Path) -> None:
    service = Service(tiny_bundle, tmp_path, require_keys=True)
    _, secret = service.storage.keys.create("me")
    causal = {"type": "session.create", "session": {"prompt": "a"}}
    async with served(service.api) as client:
        url = str(client.base_url)
        for options in (
            {"additional_headers": {"Authorization": f"Bearer {secret}"}},
            {"subprotocols": ["realtime", f"rushes-api-key.{secret}"]},
        ):
            async with opened(url, **options) as socket:
                await socket.send(json.dumps(causal))
                assert (await heard(socket, "error"))["error"]["code"] == "model_not_causal"
        for options in ({}, {"subprotocols": ["realtime", "rushes-api-key.wrong"]}):
            async with opened(url, **options) as socket:
                assert (await heard(socket, "error"))["error"]["code"] in ("missing_api_key", "invalid_api_key")
                with pytest.raises(ConnectionClosed):
                    await heard(socket, "nothing")
                assert socket.close_code == 1008

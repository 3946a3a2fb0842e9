"""Loose prompts: the bundle's rewriter, a chat endpoint, and what of it a video keeps."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pipelines import opened_pipeline
from test_runner import BrokenDenoiser
from tiny import REWRITTEN

from models.bundle import Bundle
from serving.chat import ChatRewriter, open_rewriter
from serving.deployments.attempt import Attempt, AttemptSettings, Stages
from serving.jobs.artifacts import Artifacts
from serving.jobs.database import Database
from serving.jobs.store import SqlVideoStore, Video, VideoStatus, new_video_id
from serving.pipeline.request import make_spec
from serving.pipeline.rewriting import OnnxRewriter
from serving.stage_config import RewriterConfig


@pytest.fixture
def rewriter(tiny_bundle: Bundle) -> OnnxRewriter:
    rewriter = OnnxRewriter.open(tiny_bundle)
    assert rewriter is not None
    return rewriter


@pytest.mark.parametrize("prompt", REWRITTEN)
async def test_a_loose_prompt_becomes_a_detailed_one_by_the_videos_seed(rewriter: OnnxRewriter, prompt: str) -> None:
    assert [await rewriter.rewrite(prompt, seed) for seed in (6, 7)] == list(REWRITTEN[prompt])
    assert await rewriter.rewrite(f"  {prompt.upper()} ", 2**63 - 2) == REWRITTEN[prompt][0]


@pytest.mark.parametrize("prompt", ["crimson bal hops", "?", "日本語 🎬", "x" * 5000, "ball " * 500, "", "a, b; c"])
async def test_the_graphs_say_what_torch_says(
    rewriter: OnnxRewriter, tiny_checkpoint: Path, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = pytest.importorskip("models.mini.rewriter").Rewriter.load(tiny_checkpoint / "rewriter")
    for choice in (0, 1):
        (spoken,) = module.rewrite([prompt.strip()], [choice])
        got = await rewriter.rewrite(prompt, choice)
        assert got == spoken or (got == prompt and ("made nothing" in caplog.text))


class Endpoint:
    """A real HTTP server that answers every request by `answer`; `asked` has the requests' bodies and keys."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.answer: Callable[[], tuple[int, bytes]] = lambda: (200, said("A red ball bounces."))
        self.go_on = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.asked.append((self.path, body, self.headers.get("Authorization")))
                status, content = endpoint.answer()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def said(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.01,))
    thread.start()
    yield endpoint
    endpoint.go_on.set()
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


def chat(endpoint: Endpoint, timeout_seconds: float = 30, max_characters: int = 200) -> ChatRewriter:
    return ChatRewriter(
        endpoint.url, "some-model", api_key="k", timeout_seconds=timeout_seconds, max_characters=max_characters
    )


async def test_a_chat_endpoint_rewrites(endpoint: Endpoint) -> None:
    endpoint.answer = lambda: (200, said(' "A small red ball\n bounces."\n'))
    assert await chat(endpoint).rewrite("ball, red", 7) == "A small red ball bounces."
    ((path, body, key),) = endpoint.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert (body["model"], body["seed"], body["temperature"]) == ("some-model", 7, 0)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == "ball, red"
    assert "fewer than 25 words" in body["messages"][0]["content"]


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"{}"),
        (401, b"no"),
        (200, b"not json"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"choices": []}'),
        (200, said(None)),
        (200, said(5)),
        (200, said(' "" ')),
        (200, said("long " * 100)),
    ],
    ids=range(10),
)
async def test_an_endpoint_that_fails_costs_a_warning_and_not_the_prompt(
    endpoint: Endpoint, answer: tuple[int, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.answer = lambda: answer
    assert await chat(endpoint).rewrite("ball, red", 7) == "ball, red"
    assert [record.levelno for record in caplog.records if record.name == "serving.chat"] == [logging.WARNING]


async def test_an_endpoint_that_hangs_or_is_not_there_costs_no_more(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    def hang() -> tuple[int, bytes]:
        endpoint.go_on.wait(60)
        return 200, said("late")

    endpoint.answer = hang
    assert await chat(endpoint, timeout_seconds=0.2).rewrite("ball", 7) == "ball"
    nobody = ChatRewriter("http://127.0.0.1:9/v1", "m", api_key=None, timeout_seconds=5, max_characters=99)
    assert await nobody.rewrite("ball", 7) == "ball"
    assert caplog.text.count("did not rewrite") == 2


def test_the_configuration_says_which(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_rewriter(tiny_bundle, RewriterConfig()), OnnxRewriter)
    assert open_rewriter(tiny_bundle, RewriterConfig(provider="none")) is None
    there = RewriterConfig(provider="chat", base_url="http://127.0.0.1:9/v1", model="m")
    assert isinstance(open_rewriter(tiny_bundle, there), ChatRewriter)
    bare = tiny_bundle.manifest.model_copy(update={"rewriter": None})
    assert [c.serves(bare) for c in (RewriterConfig(), RewriterConfig(provider="none"), there)] == [False, False, True]
    with pytest.raises(ValueError, match="base_url"):
        RewriterConfig(provider="chat", model="m")


class Fickle:
    """Never says the same twice, as a chat endpoint may."""

    def __init__(self) -> None:
        self.times = 0

    async def rewrite(self, prompt: str, seed: int) -> str:
        self.times += 1
        return f"{prompt}, version {self.times}"


async def test_a_retry_renders_the_prompt_of_the_first_attempt(tiny_bundle: Bundle, tmp_path: Path) -> None:
    store = SqlVideoStore(Database.open(f"sqlite:///{tmp_path / 'videos.db'}"), max_attempts=3)
    artifacts = Artifacts(tmp_path)
    settings = AttemptSettings(lease_seconds=30, max_attempts=3)
    spec = make_spec(tiny_bundle.manifest, "a ball", seconds=1, seed=7, num_inference_steps=1, rewrite_prompt=True)
    await store.create(Video(new_video_id(), "tiny", spec.prompt, "1", "128x128", asdict(spec)))
    fickle = Fickle()
    async with opened_pipeline(tiny_bundle) as pipeline:
        for denoiser in (BrokenDenoiser(), pipeline.denoiser):
            video = await store.claim("runner", 30)
            assert video is not None
            stages = Stages(pipeline.text_encoder, denoiser, pipeline.decoder, rewriter=fickle)
            await asyncio.wait_for(Attempt(video, stages, store, artifacts, settings).run(), 120)
    done = await store.get(video.id)
    assert done is not None
    # The second claim; `attempt` may be 1 again by now, for what was kept on the way resets it.
    assert (done.status, done.fence, fickle.times) == (VideoStatus.COMPLETED, 2, 1)
    assert (done.prompt, done.request["revised_prompt"]) == ("a ball", "a ball, version 1")


async def test_what_is_rendered_is_the_revised_prompt(tiny_bundle: Bundle) -> None:
    loose = next(iter(REWRITTEN))

    async def frames(prompt: str, rewrite: bool) -> list[bytes]:
        made: list[bytes] = []

        async def sink(fragment: Any) -> None:
            made.append(fragment.data)

        asked = {"seconds": 1, "seed": 7, "num_inference_steps": 1, "rewrite_prompt": rewrite}
        await pipeline.generate(make_spec(tiny_bundle.manifest, prompt, **asked), sink)
        return made

    async with opened_pipeline(tiny_bundle) as pipeline:
        rewritten = await frames(loose, rewrite=True)
        assert rewritten == await frames(REWRITTEN[loose][1], rewrite=False)
        assert rewritten != await frames(loose, rewrite=False)

"""Captions of latents and of files, and the best of several videos."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from pipelines import opened_pipeline
from tiny import CAPTIONED, CHANNELS
from typer.testing import CliRunner

from models.bundle import Bundle
from serving.cli import app
from serving.media.frames import read_frames
from serving.pipeline.captioning import EngineCaptioner, in_common
from serving.pipeline.encoding import EngineEncoder
from serving.pipeline.generation import generate
from serving.pipeline.request import InvalidRequest, make_spec
from serving.pipeline.stages import DenoiseRequest, Fragment, LatentChunk, StepDone, VideoSpec


def captioner_of(bundle: Bundle) -> EngineCaptioner:
    captioner = EngineCaptioner.open(bundle)
    assert captioner is not None
    return captioner


def clip(value: float, frames: int = 3, height: int = 4, width: int = 4) -> Any:
    noise = np.random.default_rng(2).standard_normal((CHANNELS, frames, height, width))
    return (value + 0.2 * noise).astype(np.float32)


@pytest.mark.parametrize("value", CAPTIONED)
async def test_latents_get_their_caption(tiny_bundle: Bundle, value: float) -> None:
    captioner = captioner_of(tiny_bundle)
    assert await captioner.caption(clip(value)) == CAPTIONED[value]
    # Only the beginning of a long one is looked at.
    assert await captioner.caption(np.concatenate([clip(value), clip(-value)], axis=1)) == CAPTIONED[value]


async def test_the_graphs_say_what_torch_says(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("models.mini.captioner").Captioner.load(tiny_checkpoint / "captioner")
    captioner = captioner_of(tiny_bundle)
    for value, shape in [(0.3, (1, 2, 6)), (-0.4, (2, 6, 4)), (0.9, (3, 8, 8))]:
        latents = clip(value, *shape)
        (spoken,) = module.caption(torch.from_numpy(latents[None]))
        assert await captioner.caption(latents) in (spoken, "")


async def test_agreement_is_more_for_the_right_prompt(tiny_bundle: Bundle) -> None:
    captioner = captioner_of(tiny_bundle)
    low, high = CAPTIONED
    for prompt in (CAPTIONED[low], "the small RED ball, moving left!"):
        right, wrong = [await captioner.agreement(clip(value), prompt) for value in (low, high)]
        assert right > wrong
    assert (await captioner.agreement(clip(low), CAPTIONED[low])) <= 0


def test_in_common() -> None:
    assert in_common("a red ball", "a red ball") == 1
    assert in_common("a red ball", "Two blue cubes") == 0
    assert in_common("a red ball", "a ball red") < 1
    assert in_common("", "") == 0


class Counting:
    """The real decoder, with the latents that it was given."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.chunks = decoder, list[LatentChunk]()

    async def decode(self, video_id: str, spec: VideoSpec, chunk: LatentChunk, *, interactive: bool = True) -> Fragment:
        self.chunks.append(chunk)
        fragment: Fragment = await self.decoder.decode(video_id, spec, chunk, interactive=interactive)
        return fragment

    async def close(self, video_id: str) -> None:
        await self.decoder.close(video_id)


async def test_the_best_of_several_alone_is_decoded(tiny_bundle: Bundle) -> None:
    asked = {"seconds": 1, "num_inference_steps": 2, "guidance_scale": 1, "rewrite_prompt": False}
    async with opened_pipeline(tiny_bundle) as pipeline:
        assert pipeline.captioner is not None
        # Both captions, so that not every best is the first of its seeds.
        for prompt in CAPTIONED.values():
            agreements, all_latents = [], []
            for seed in (7, 8, 9):
                spec = make_spec(tiny_bundle.manifest, prompt, seed=seed, **asked)
                request = DenoiseRequest("v", spec, await pipeline.text_encoder.encode(prompt), None)
                chunks = [e async for e in pipeline.denoiser.denoise(request) if isinstance(e, LatentChunk)]
                all_latents.append(np.concatenate([chunk.latents for chunk in chunks], axis=1))
                agreements.append(await pipeline.captioner.agreement(all_latents[-1], prompt))
            counting, seen, steps = Counting(pipeline.decoder), list[Fragment](), list[StepDone]()

            async def sink(fragment: Fragment, seen: list[Fragment] = seen) -> None:
                seen.append(fragment)

            await generate(
                "video",
                make_spec(tiny_bundle.manifest, prompt, seed=7, best_of=3, **asked),
                text_encoder=pipeline.text_encoder,
                denoiser=pipeline.denoiser,
                decoder=counting,
                captioner=pipeline.captioner,
                sink=sink,
                on_progress=steps.append,
            )
            best = all_latents[int(np.argmax(agreements))]
            np.testing.assert_array_equal(np.concatenate([c.latents for c in counting.chunks], axis=1), best)
            assert [fragment.index for fragment in seen] == list(range(len(counting.chunks)))
            assert [(step.step, step.steps) for step in steps] == [(n + 1, 6) for n in range(6)]


async def test_kept_guidance_is_each_candidates_own(tiny_bundle: Bundle) -> None:
    """Steps enough that every candidate has one that makes do with the step before's guidance, and one after it."""
    prompt, steps = "a red ball", 5
    asked = {"seconds": 1, "size": "64x64", "num_inference_steps": steps, "rewrite_prompt": False}
    async with opened_pipeline(tiny_bundle) as pipeline:

        async def made(**settings: Any) -> bytes:
            fragments: list[Fragment] = []

            async def sink(fragment: Fragment) -> None:
                fragments.append(fragment)

            await pipeline.generate(make_spec(tiny_bundle.manifest, prompt, **asked, **settings), sink)
            return b"".join(fragment.data for fragment in fragments)

        kept: dict[str, Any] = {"seed": 7, "best_of": 3, "guidance_cache": "alternate"}
        best = await made(**kept)
        assert best in [await made(seed=seed, guidance_cache="alternate") for seed in (7, 8, 9)]
        others = [await made(**kept | {"guidance_cache": "off"}), await made(**kept | {"seed": 20, "best_of": 2})]
        assert len({best, *others}) == 3
        calls = len(pipeline.denoiser.trace)
        assert await asyncio.gather(
            made(**kept | {"guidance_cache": "off"}), made(**kept), made(**kept | {"seed": 20, "best_of": 2})
        ) == [others[0], best, others[1]]
        assert len(pipeline.denoiser.trace) - calls < (3 + 3 + 2) * steps


def test_best_of_is_checked(tiny_bundle: Bundle) -> None:
    for wrong in (0, 9, "two", True):
        with pytest.raises(InvalidRequest, match="best_of"):
            make_spec(tiny_bundle.manifest, "a ball", best_of=wrong)
    blind = tiny_bundle.manifest.model_copy(update={"captioner": None})
    with pytest.raises(InvalidRequest, match="no captioner"):
        make_spec(blind, "a ball", best_of=2)
    assert make_spec(blind, "a ball", best_of=1).best_of == 1


def write_video(path: Path, fps: int, shades: list[int]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (16, [20, 60, 100, 140, 180, 220]),
        (8, [20, 20, 60, 60, 100, 100, 140, 140, 180, 180, 220]),
        (32, [20, 100, 180]),
    ],
)
def test_frames_come_at_the_models_rate_and_size(tmp_path: Path, fps: int, expected: list[int]) -> None:
    write_video(tmp_path / "a.mp4", fps, [20, 60, 100, 140, 180, 220])
    frames = list(read_frames(tmp_path / "a.mp4", fps=16, width=32, height=48))
    assert {frame.shape for frame in frames} == {(48, 32, 3)}
    np.testing.assert_allclose([frame.mean() for frame in frames], expected, atol=4)


def test_encoding_stops_where_the_captioner_does(tiny_bundle: Bundle) -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield np.full((64, 64, 3), 100, np.uint8)

    latents = EngineEncoder.open(tiny_bundle).encode(endless(), 3)
    assert (latents.shape, read) == ((CHANNELS, 3, 4, 4), 9)
    assert EngineEncoder.open(tiny_bundle).encode(iter([np.zeros((64, 64, 3), np.uint8)] * 8), 3).shape[1] == 2


def test_a_file_gets_a_caption(tiny_bundle: Bundle, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 16, [20, 60, 100, 140, 180])
    bundle = ["--bundle", str(tiny_bundle.root)]
    done = CliRunner().invoke(app, ["caption", str(tmp_path / "a.mp4"), *bundle])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("\n")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    for missing in ("b.mp4", "c.mp4"):
        done = CliRunner().invoke(app, ["caption", str(tmp_path / missing), *bundle])
        assert (done.exit_code, done.stdout) == (1, "")
        assert "can't be read" in done.stderr

"""Models that take a picture as channels (Wan 2.1): the video is what diffusers makes of the same picture."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import torch
from pictures import png
from service import Service, WholeService, assert_envelope
from tiny import build_tiny_pictured
from transformers import CLIPImageProcessor
from typer.testing import CliRunner

from export.captioner import encoders
from export.proof import LEAST_PSNR, _levels, _take, compare, denoise
from export.settings import CheckpointSettings
from models.bundle import Bundle, GraphInfo, GraphName, Manifest, TensorInfo, TextInfo
from models.families import open_checkpoint
from models.pictures import GREY, condition_of, looked_at, with_grey
from models.wan_family import WanFamily
from serving.cli import app
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.measuring import _call
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.sessions import _Noise
from serving.pipeline.stages import DenoiseRequest, EncodedSource, LatentChunk

pytestmark = pytest.mark.timeout(900)

SIDE, STEPS, SEED = 64, 3, 7
ASKED = {"prompt": "a red ball", "seconds": 1, "size": "64x64", "seed": SEED, "num_inference_steps": STEPS}


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.ascontiguousarray(squares.repeat(SIDE // 8, axis=0).repeat(SIDE // 8, axis=1))


def test_the_bundle_is_proven_with_a_picture(tiny_pictured_bundle: Bundle) -> None:
    manifest = tiny_pictured_bundle.manifest
    assert manifest.pictured
    assert manifest.image is not None
    assert manifest.proof is not None
    assert manifest.proof.reference == "diffusers' pipeline"
    assert min(manifest.proof.psnr_db, manifest.proof.worst_frame_psnr_db) >= LEAST_PSNR
    for name in ("denoiser", "image_encoder", "encoder_first", "encoder_next"):
        graph = manifest.graphs[name]
        assert len(graph.verified_shapes) >= 3
        assert max(graph.parity.values()) <= 1e-4


async def test_a_video_is_what_diffusers_makes_of_the_picture(
    tiny_pictured_bundle: Bundle, tiny_pictured_checkpoint: Path
) -> None:
    manifest = tiny_pictured_bundle.manifest
    spec = replace(make_spec(manifest, **ASKED), source="picture", source_frames=1)
    async with LocalPipeline.open(tiny_pictured_bundle) as pipeline:
        assert pipeline.encoder is not None
        texts = [await pipeline.text_encoder.encode(prompt) for prompt in ("a red ball", "")]

        async def made(source: EncodedSource) -> np.ndarray[Any, Any]:
            request = DenoiseRequest("video", spec, texts[0], texts[1], source=source)
            async with aclosing(pipeline.denoiser.denoise(request)) as events:
                return np.concatenate([e.latents async for e in events if isinstance(e, LatentChunk)], axis=1)

        sources = [await pipeline.encoder.encode_source(picture(seed)[None], spec.frames) for seed in (1, 2)]
        latents, other = await made(sources[0]), await made(sources[1])
        assert sources[0].hidden_states is not None
        # Both ways to see it matter.
        assert np.abs(await made(replace(sources[1], hidden_states=sources[0].hidden_states)) - other).max() > 1e-3
        assert np.abs(await made(replace(sources[1], latents=sources[0].latents)) - other).max() > 1e-3
        with pytest.raises(ValueError, match="makes a video of one picture, not of 2 frames"):
            await pipeline.encoder.encode_source(np.stack([picture(1)] * 2), spec.frames)

    family = open_checkpoint(
        tiny_pictured_checkpoint, CheckpointSettings.load(tiny_pictured_checkpoint).plan(tiny_pictured_checkpoint)
    )
    noise = torch.from_numpy(_Noise(SEED).draw(latents.shape)[None])
    take = replace(_take(manifest), prompt="a red ball", noise=noise, frames=spec.frames, picture=picture(1))
    assert take.steps == STEPS
    expected = _levels(family.make(take))
    with torch.no_grad():
        pixels = family.decode(torch.from_numpy(latents)[None])[0].permute(1, 2, 3, 0).clamp(-1, 1).numpy()
    assert min(compare(_levels(pixels / 2 + 0.5), expected)) >= LEAST_PSNR


async def test_through_the_service_and_by_the_command(tiny_pictured_bundle: Bundle, tmp_path: Path) -> None:
    async with LocalPipeline.open(tiny_pictured_bundle) as pipeline:
        service = WholeService(tiny_pictured_bundle, pipeline, tmp_path)
        async with service.running() as client:

            async def made(seed: int) -> bytes:
                fields = {name: str(value) for name, value in ASKED.items()}
                file = {"input_reference": ("a.png", png(picture(seed)), "image/png")}
                video = (await client.post("/v1/videos", data=fields, files=file)).json()
                while video["status"] not in ("completed", "failed"):
                    await asyncio.sleep(0.02)
                    video = (await client.get(f"/v1/videos/{video['id']}")).json()
                assert video["status"] == "completed", video
                remix = await client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "x"})
                assert_envelope(remix, 400, "video_id")
                extended = {"prompt": "x", "seconds": 1, "video": {"id": video["id"]}}
                assert_envelope(await client.post("/v1/videos/extensions", json=extended), 400, "video")
                return (await client.get(f"/v1/videos/{video['id']}/content")).content

            first, again, other = await made(1), await made(1), await made(2)
    assert first == again != other
    (tmp_path / "a.png").write_bytes(png(picture(1)))
    options = ["a red ball", "--seconds", "1", "--size", "64x64", "--seed", "7", "--steps", "3"]
    options += ["--bundle", str(tiny_pictured_bundle.root), "-o", str(tmp_path / "a.mp4")]
    asked = ["generate", *options, "--picture", str(tmp_path / "a.png")]
    result = await asyncio.to_thread(CliRunner().invoke, app, asked)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.mp4").read_bytes() == first
    result = await asyncio.to_thread(CliRunner().invoke, app, ["generate", *options])
    assert result.exit_code != 0
    assert "makes videos of a picture" in " ".join(result.output.split())


async def test_without_a_picture_there_is_no_video(tiny_pictured_bundle: Bundle, tmp_path: Path) -> None:
    service = Service(tiny_pictured_bundle, tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.api), base_url="http://test") as client:
        assert_envelope(await client.post("/v1/videos", json=ASKED), 400, "input_reference")
        assert (await client.get("/v1/models/tiny")).json()["needs_picture"]
    assert service.created() == 0


def test_what_a_call_takes_can_be_measured(tiny_pictured_bundle: Bundle) -> None:
    manifest = tiny_pictured_bundle.manifest
    engine = OnnxRuntimeEngine(tiny_pictured_bundle.path_of("denoiser"))
    spec = make_spec(manifest, **{**ASKED, "guidance_scale": 1})
    assert _call(manifest, engine, spec, 2, time.perf_counter).tokens == 5 * 4 * 4


def test_two_experts_without_an_image_encoder(tmp_path: Path) -> None:
    """A14B's kind, in torch: its graphs are of the kinds that are exported elsewhere."""
    build_tiny_pictured(tmp_path, experts=True)
    settings = CheckpointSettings.load(tmp_path)
    plan = settings.plan(tmp_path)
    family = open_checkpoint(tmp_path, plan)
    assert isinstance(family, WanFamily)
    assert family.image is None
    graphs = {
        graph.name: graph
        for graph in (*family.graphs(plan), *encoders(family.checkpoint, family.latent, torch.float32))
    }
    used: set[str] = set()

    def call(name: GraphName, feeds: Any) -> dict[str, Any]:
        used.add(name)
        tensors = {key: torch.from_numpy(np.ascontiguousarray(feeds[key])) for key in graphs[name].example}
        return {key: value.numpy() for key, value in graphs[name].reference(tensors).items()}

    def described(name: str) -> GraphInfo:
        inputs = [
            TensorInfo(name=key, dtype="float32", shape=tuple(value.shape))
            for key, value in graphs[name].example.items()
        ]
        return GraphInfo(file=f"{name}.onnx", inputs=tuple(inputs), outputs=())

    manifest = Manifest(
        name="tiny",
        family="wan",
        rollout="bidirectional",
        fps=settings.fps,
        chunk_latent_frames=settings.chunk_latent_frames,
        experts=family.experts,
        text=TextInfo(tokenizer="tokenizer.json", max_tokens=settings.max_tokens, dim=family.text_dim),
        latent=family.latent,
        sampler=settings.sampler_info(family.scheduler),
        limits=settings.limits,
        graphs={name: described(name) for name in ("denoiser", "denoiser_2", "encoder_first", "encoder_next")},
        files={},
        versions={},
    )
    take = _take(manifest)
    assert take.picture is not None
    latents = denoise(call, manifest, take, family.tokenizer)
    assert {"denoiser", "denoiser_2", "encoder_next"} <= used
    with torch.no_grad():
        pixels = family.decode(torch.from_numpy(latents))[0].permute(1, 2, 3, 0).clamp(-1, 1).numpy()
    assert min(compare(_levels(pixels / 2 + 0.5), _levels(family.make(take)))) >= LEAST_PSNR


def test_the_condition_is_a_mask_and_the_latents() -> None:
    condition = condition_of(np.full((8, 3, 2, 2), 5, np.float32), 4)
    assert condition.shape == (12, 3, 2, 2)
    assert condition[:, 0, 0, 0].tolist() == [1] * 4 + [5] * 8
    assert condition[:, 1, 0, 0].tolist() == [0] * 4 + [5] * 8
    frames = list(with_grey(picture(1), 5))
    assert len(frames) == 5
    assert set(np.unique(frames[4])) == {GREY}


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 83), (20, 33), (33, 31), (32, 32)])
def test_clip_looks_at_what_its_processor_makes(height: int, width: int) -> None:
    given = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False
    )
    made = processor(images=PIL.Image.fromarray(given), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(looked_at(given, 32), made.transpose(1, 2, 0))

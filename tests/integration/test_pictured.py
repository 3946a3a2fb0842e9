"""Models that take a picture as channels (Wan 2.1): the video is what diffusers makes of the same picture."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
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
from export.checkpoint import _graph
from export.onnx import WeightFile
from export.proof import LEAST_PSNR, _levels, _take, compare, denoise, prove
from export.settings import CheckpointSettings
from export.tensorrt import export_plans, open_target
from models.bundle import MANIFEST, Bundle, FileInfo, GraphInfo, GraphName, Manifest, TensorInfo, TextInfo, sha256_of
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "pictured"
    build_tiny_pictured(path)
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tiny_experts_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The text encoder and the VAE are exported already, in the bundle of the experts: only the rest is here."""
    folder = tmp_path_factory.mktemp("bundles") / "pictured"
    shutil.copytree(tiny_experts_bundle.root, folder)
    for name in ("denoiser", "denoiser_2"):
        for suffix in ("onnx", "weights"):
            (folder / f"{name}.{suffix}").unlink()
    settings = CheckpointSettings.load(checkpoint)
    plan = settings.plan(checkpoint)
    family = open_checkpoint(checkpoint, plan)
    graphs = family.graphs(plan)
    old = tiny_experts_bundle.manifest
    infos = {name: info for name, info in old.graphs.items() if name != "denoiser_2"}
    for graph in graphs:
        if graph.name in ("denoiser", "image_encoder"):
            infos[graph.name] = _graph(graph, WeightFile(folder / graph.weights), folder, print, verify=True)
    manifest = old.model_copy(
        update={
            "name": "tiny-pictured",
            "experts": None,
            "rewriter": None,
            "captioner": None,
            "image": family.image,
            "text": old.text.model_copy(update={"max_tokens": settings.max_tokens}),
            "limits": settings.limits,
            "graphs": infos,
            "files": {
                path.name: FileInfo(sha256=sha256_of(path), bytes=path.stat().st_size)
                for path in folder.iterdir()
                if path.name != MANIFEST
            },
        }
    )
    manifest = manifest.model_copy(update={"proof": prove(family, graphs, manifest, folder)})
    (folder / MANIFEST).write_text(manifest.model_dump_json(exclude_none=True))
    made = Bundle.load(folder)
    made.verify()
    return made


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.ascontiguousarray(squares.repeat(SIDE // 8, axis=0).repeat(SIDE // 8, axis=1))


def test_the_bundle_is_proven_with_a_picture(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.pictured
    assert manifest.image is not None
    assert manifest.proof is not None
    assert manifest.proof.reference == "diffusers' pipeline"
    assert min(manifest.proof.psnr_db, manifest.proof.worst_frame_psnr_db) >= LEAST_PSNR
    for name in ("denoiser", "image_encoder", "encoder_first", "encoder_next"):
        graph = manifest.graphs[name]
        assert len(graph.verified_shapes) >= 3
        assert max(graph.parity.values()) <= 1e-4


async def test_a_video_is_what_diffusers_makes_of_the_picture(bundle: Bundle, checkpoint: Path) -> None:
    manifest = bundle.manifest
    spec = replace(make_spec(manifest, **ASKED), source="picture", source_frames=1)
    async with LocalPipeline.open(bundle) as pipeline:
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

    family = open_checkpoint(checkpoint, CheckpointSettings.load(checkpoint).plan(checkpoint))
    noise = torch.from_numpy(_Noise(SEED).draw(latents.shape)[None])
    take = replace(_take(manifest), prompt="a red ball", noise=noise, frames=spec.frames, picture=picture(1))
    assert take.steps == STEPS
    expected = _levels(family.make(take))
    with torch.no_grad():
        pixels = family.decode(torch.from_numpy(latents)[None])[0].permute(1, 2, 3, 0).clamp(-1, 1).numpy()
    assert min(compare(_levels(pixels / 2 + 0.5), expected)) >= LEAST_PSNR


async def test_through_the_service_and_by_the_command(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many threads as the service's stages have: a VAE's last bits may depend on it.
    monkeypatch.setattr("serving.oneshot.os.sched_getaffinity", lambda _: {0})
    async with LocalPipeline.open(bundle) as pipeline:
        service = WholeService(bundle, pipeline, tmp_path)
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
    options += ["--bundle", str(bundle.root), "-o", str(tmp_path / "a.mp4")]
    asked = ["generate", *options, "--picture", str(tmp_path / "a.png")]
    result = await asyncio.to_thread(CliRunner().invoke, app, asked)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.mp4").read_bytes() == first
    result = await asyncio.to_thread(CliRunner().invoke, app, ["generate", *options])
    assert result.exit_code != 0
    assert "makes videos of a picture" in " ".join(result.output.split())


async def test_without_a_picture_there_is_no_video(bundle: Bundle, tmp_path: Path) -> None:
    service = Service(bundle, tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.api), base_url="http://test") as client:
        assert_envelope(await client.post("/v1/videos", json=ASKED), 400, "input_reference")
        assert (await client.get("/v1/models/tiny")).json()["needs_picture"]
    assert service.created() == 0


def test_tensorrt_takes_it(bundle: Bundle, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("pip install tensorrt-rtx (Linux and Windows on x86-64 only)")
    assert len(export_plans(bundle, open_target("tensorrt_rtx", "8.9"), tmp_path, graphs=["denoiser"])) == 1


def test_what_a_call_takes_can_be_measured(bundle: Bundle) -> None:
    manifest = bundle.manifest
    engine = OnnxRuntimeEngine(bundle.path_of("denoiser"))
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
    graphs = {graph.name: graph for graph in (*family.graphs(plan), *encoders(family.checkpoint, family.latent))}
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

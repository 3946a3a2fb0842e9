"""LoRAs that requests name: what an engine makes of them is what diffusers makes of them unmerged."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from adapters import save_adapter
from diffusers import WanPipeline, WanTransformer3DModel
from service import Service, WholeService, assert_envelope
from tiny import tiny_transformer
from watched import Watched

from export.checkpoint import _graph
from export.named_lora import NamedLora, attach, switched
from export.onnx import ExportError, WeightFile
from export.settings import CheckpointSettings
from export.tensorrt import export_plans, open_target
from models.bundle import MANIFEST, Bundle, FileInfo, Manifest, sha256_of
from models.families import open_checkpoint
from models.plans import PlanInfo
from serving.engines.engine import Array, EngineError
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import InvalidRequest, make_spec
from serving.pipeline.shortcuts import GUIDANCE_CACHES
from serving.pipeline.stages import Fragment, VideoSpec

pytestmark = pytest.mark.timeout(900)

ASKED: dict[str, Any] = {"prompt": "a red ball", "seconds": 1, "size": "64x64", "seed": 7, "num_inference_steps": 2}
STYLED: dict[str, Any] = ASKED | {"lora": [{"name": "style", "scale": 0.5}, "mood"]}


def transformer(checkpoint: Path) -> Any:
    return WanTransformer3DModel.from_pretrained(checkpoint / "transformer").eval()


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of many layers, and one of few, of another rank, in the time embedding too, which has a row a token."""
    folder = tmp_path_factory.mktemp("loras")
    targets = ["to_q", "time_embedder.linear_1"]
    return {
        "style": save_adapter(transformer(tiny_checkpoint), folder / "style", 1),
        "mood": save_adapter(transformer(tiny_checkpoint), folder / "mood", 2, r=2, target_modules=targets),
    }


@pytest.fixture(scope="module")
def bundle(
    tiny_bundle: Bundle, tiny_checkpoint: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The tiny bundle with another denoiser: no other graph has anything of a LoRA."""
    folder = tmp_path_factory.mktemp("bundles") / "adapted"
    shutil.copytree(tiny_bundle.root, folder)
    (folder / "denoiser.weights").unlink()
    plan = CheckpointSettings.load(tiny_checkpoint).plan(tiny_checkpoint)
    family = open_checkpoint(tiny_checkpoint, plan)
    asked = NamedLora.parse([f"style={files['style']}", f"mood={files['mood']}:2"])
    loras, branches = attach(asked, family.transformers, family.lora_loader)
    graph = next(switched(graph, branches) for graph in family.graphs(plan) if graph.name == "denoiser")
    info = _graph(graph, WeightFile(folder / "denoiser.weights"), folder, print, verify=True)
    assert info.parity["velocity"] <= 1e-4
    changed = {
        name: FileInfo(sha256=sha256_of(folder / name), bytes=(folder / name).stat().st_size)
        for name in ("denoiser.onnx", "denoiser.weights")
    }
    old = tiny_bundle.manifest
    manifest = old.model_copy(
        update={"graphs": old.graphs | {"denoiser": info}, "loras": loras, "files": old.files | changed}
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(exclude_none=True))
    made = Bundle.load(folder)
    made.verify()
    return made


@pytest.fixture
async def pipeline(bundle: Bundle) -> AsyncIterator[LocalPipeline]:
    async with LocalPipeline.open(bundle) as opened:
        yield opened


def test_a_row_is_what_diffusers_makes_with_the_same_adapters(
    bundle: Bundle, tiny_bundle: Bundle, tiny_checkpoint: Path, files: dict[str, Path]
) -> None:
    latent, text = bundle.manifest.latent, bundle.manifest.text
    rng = np.random.default_rng(5)
    scales = [(0.0, 0.0), (1.0, 0.0), (0.0, -0.5), (0.7, 1.5)]
    feeds = {
        "latents": rng.standard_normal((4, latent.channels, 3, 6, 4), dtype=np.float32),
        "timestep": rng.uniform(0, 1000, (4, 3)).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((4, text.max_tokens, text.dim), dtype=np.float32),
    }
    engine = OnnxRuntimeEngine(bundle.path_of("denoiser"))
    got = engine.run({"lora_scales": np.array(scales, np.float32), **feeds})["velocity"]

    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer(tiny_checkpoint)
    )
    for name, path in files.items():
        pipeline.load_lora_weights(path, adapter_name=name)
    for row, (style, mood) in enumerate(scales):
        # The bundle's mood is twice the file's.
        pipeline.set_adapters(["style", "mood"], [style, 2 * mood])
        latents, timestep, states = (torch.from_numpy(value[row : row + 1]) for value in feeds.values())
        with torch.no_grad():
            by_token = timestep.repeat_interleave(6, dim=1)
            expected = pipeline.transformer(latents, by_token, states, return_dict=False)[0].numpy()[0]
        assert np.abs(got[row] - expected).max() <= 1e-4
        assert row == 0 or np.abs(got[row] - got[0]).max() > 1e-2
        # Whatever else is in the batch.
        alone = engine.run(
            {"lora_scales": np.array([(style, mood)], np.float32), **{k: v[row : row + 1] for k, v in feeds.items()}}
        )
        np.testing.assert_array_equal(alone["velocity"][0], got[row])
    plain = OnnxRuntimeEngine(tiny_bundle.path_of("denoiser")).run({k: v[:1] for k, v in feeds.items()})["velocity"][0]
    assert np.abs(plain - got[0]).max() <= 1e-5


def test_tensorrt_takes_it(bundle: Bundle, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("pip install tensorrt-rtx (Linux and Windows on x86-64 only)")
    (plan,) = export_plans(bundle, open_target("tensorrt_rtx", "8.9"), tmp_path, graphs=["denoiser"], rows=4)
    info = PlanInfo.model_validate_json(plan.with_suffix(".json").read_bytes())
    assert [profile["lora_scales"] for profile in info.basis.profiles] == [((1, 2), (2, 2), (4, 2))] * 2


async def test_requests_with_and_without_share_a_batch_and_are_each_right(pipeline: LocalPipeline) -> None:
    manifest = pipeline.bundle.manifest
    asked = [{**ASKED, "lora": lora} for lora in (None, "style", {"name": "style", "scale": 0.5}, ["mood", "style"])]
    specs = [make_spec(manifest, one.pop("prompt"), rewrite_prompt=False, **one) for one in asked]
    await assert_each_is_right_beside_the_others(pipeline, specs)


async def test_kept_guidance_is_of_the_videos_own_lora(pipeline: LocalPipeline) -> None:
    """Steps enough that each video has one that makes do with the step before's guidance, and one after it."""
    settings = ASKED | {"num_inference_steps": 5, "rewrite_prompt": False}
    prompt = settings.pop("prompt")
    specs = [
        make_spec(pipeline.bundle.manifest, prompt, **settings, lora=lora, guidance_cache=guidance_cache)
        for lora in (None, "style", ["mood", "style"])
        for guidance_cache in GUIDANCE_CACHES
    ]
    await assert_each_is_right_beside_the_others(pipeline, specs)


async def assert_each_is_right_beside_the_others(pipeline: LocalPipeline, specs: Sequence[VideoSpec]) -> None:
    """All differ, and none by what it is made with."""

    async def made(spec: VideoSpec) -> bytes:
        fragments: list[Fragment] = []

        async def sink(fragment: Fragment) -> None:
            fragments.append(fragment)

        await pipeline.generate(spec, sink)
        return b"".join(fragment.data for fragment in fragments)

    alone = [await made(spec) for spec in specs]
    assert len(set(alone)) == len(alone)
    calls = len(pipeline.denoiser.trace)
    assert await asyncio.gather(*[made(spec) for spec in specs]) == alone
    assert len(pipeline.denoiser.trace) - calls < len(specs) * specs[0].num_inference_steps


async def test_it_goes_with_the_request_through_queue_crash_remix_and_batch(
    bundle: Bundle, pipeline: LocalPipeline, tmp_path: Path
) -> None:
    seen: list[list[float]] = []
    failures = [True]

    def fail_once(feeds: Mapping[str, Array]) -> None:
        seen.append(feeds["lora_scales"][0].tolist())
        if len(seen) == 2 and failures:
            failures.pop()
            raise EngineError("denoiser: out of memory")

    service = WholeService(bundle, pipeline, tmp_path)
    service.stages["denoiser"] = EngineDenoiser(
        Watched(OnnxRuntimeEngine(bundle.path_of("denoiser")), fail_once), bundle.manifest
    )
    wanted = [{"name": "style", "scale": 0.5}, {"name": "mood", "scale": 1.0}]
    async with service.running() as client:

        async def ended(video: dict[str, Any]) -> dict[str, Any]:
            while video["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.05)
                video = (await client.get(f"/v1/videos/{video['id']}")).json()
            assert video["status"] == "completed", video
            return video

        video = await ended((await client.post("/v1/videos", json=STYLED)).json())
        assert video["lora"] == wanted
        assert failures == []
        assert len(seen) == 4  # the first step, the one that failed, and both once more
        remix = {"prompt": "a blue ball", "strength": 1.0}
        kept = await ended((await client.post(f"/v1/videos/{video['id']}/remix", json=remix)).json())
        assert kept["lora"] == wanted
        assert seen == [[0.5, 1.0]] * 6
        none = (await client.post(f"/v1/videos/{video['id']}/remix", json=remix | {"lora": []})).json()
        assert (await ended(none))["lora"] == []
        line = {"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": STYLED}
        file = {"file": ("a.jsonl", json.dumps(line))}
        uploaded = (await client.post("/v1/files", files=file, data={"purpose": "batch"})).json()
        asked = {"input_file_id": uploaded["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=asked)).json()
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.05)
            batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        answer = json.loads((await client.get(f"/v1/files/{batch['output_file_id']}/content")).text)
        assert answer["response"]["body"]["lora"] == wanted
        contents = [
            await client.get(f"/v1/videos/{id}/content") for id in (video["id"], answer["response"]["body"]["id"])
        ]
        assert contents[0].content == contents[1].content
    await service.stages["denoiser"].stop()


@pytest.fixture
def client(bundle: Bundle, tmp_path: Path) -> Iterator[httpx.AsyncClient]:
    service = Service(bundle, tmp_path)
    transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
    yield httpx.AsyncClient(transport=transport, base_url="http://test")
    assert service.created() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        "stile",
        "",
        5,
        {},
        {"name": "style", "scale": "much"},
        {"name": "style", "scale": 100},
        {"name": "style", "scale": True},
        {"name": "style", "weight": 1},
        {"name": ["style"]},
        ["style", {"name": "style"}],
        ["style", 1],
        [["style"]],
    ],
    ids=str,
)
async def test_what_is_wrong_is_refused_by_name(client: httpx.AsyncClient, wrong: Any) -> None:
    assert_envelope(await client.post("/v1/videos", json=ASKED | {"lora": wrong}), 400, "lora")


async def test_the_models_list_and_the_document_name_them(client: httpx.AsyncClient) -> None:
    (model, _) = (await client.get("/v1/models")).json()["data"]
    assert model["loras"] == ["style", "mood"]
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["properties"]["lora"]["anyOf"][0]["enum"] == ["style", "mood"]
    assert body["multipart/form-data"]["schema"]["properties"]["lora"]["enum"] == ["style", "mood"]


async def test_a_form_may_name_one(bundle: Bundle, tmp_path: Path) -> None:
    service = Service(bundle, tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.api), base_url="http://test") as client:
        made = await client.post("/v1/videos", files={"prompt": (None, "a ball"), "lora": (None, "mood")})
        assert made.json()["lora"] == [{"name": "mood", "scale": 1.0}]
    # What the queue keeps is JSON.
    spec = VideoSpec(**json.loads(json.dumps(asdict(make_spec(bundle.manifest, "a ball", lora="mood")))))
    assert dict(spec.lora) == {"mood": 1.0}


def test_a_model_without_any_says_so(tiny_bundle: Bundle) -> None:
    with pytest.raises(InvalidRequest, match="lora must be left out: this model has none, and not 'style'"):
        make_spec(tiny_bundle.manifest, "a ball", lora="style")


def test_a_manifest_must_fit_its_denoiser(bundle: Bundle) -> None:
    said = json.loads(bundle.manifest.model_dump_json())
    for loras in ([], said["loras"][:1]):
        with pytest.raises(ValueError, match="scales of other LoRAs than the"):
            Manifest.model_validate_json(json.dumps(said | {"loras": loras}))
    with pytest.raises(ValueError, match="a name twice"):
        Manifest.model_validate_json(json.dumps(said | {"loras": said["loras"][:1] * 2}))


@pytest.mark.parametrize("text", ["style", "=a", "a b=c", "style=:1"])
def test_how_they_are_not_spelt(text: str) -> None:
    with pytest.raises(ExportError):
        NamedLora.parse([text])


def test_what_can_not_be_switched_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    model = tiny_transformer()
    path = save_adapter(tiny_transformer(), tmp_path, 3, target_modules=["patch_embedding"])
    from diffusers.loaders import WanLoraLoaderMixin

    with pytest.raises(ExportError, match="patch_embedding, a Conv3d: only what is linear can be switched; use --lora"):
        attach(NamedLora.parse([f"style={path}"]), {"transformer": model}, WanLoraLoaderMixin)
    assert not any(name.endswith("lora_down") for name, _ in model.named_buffers())

"""A bundle's tiny decoder: exported and proven like the VAE's, and decoding the videos that ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from pipelines import opened_pipeline
from service import Service, served

from export.onnx import ExportError
from export.parity import TOLERANCE
from export.small_models import SmallModels
from models.bundle import Bundle
from models.families import open_checkpoint
from models.tiny_decoder import TINY_DECODER, TinyDecoder
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import InvalidRequest, make_spec
from serving.pipeline.stages import Fragment, LatentChunk, LostSession, VideoSpec


@pytest.fixture
async def pipeline(tiny_causal_bundle: Bundle) -> AsyncGenerator[LocalPipeline, None]:
    async with opened_pipeline(tiny_causal_bundle) as opened:
        yield opened


def spec_of(bundle: Bundle, decoder: str | None) -> VideoSpec:
    return make_spec(bundle.manifest, "a red ball", seconds=1, seed=3, rewrite_prompt=False, decoder=decoder)


async def made(pipeline: LocalPipeline, decoder: str | None) -> list[Fragment]:
    fragments: list[Fragment] = []

    async def sink(fragment: Fragment) -> None:
        fragments.append(fragment)

    await pipeline.generate(spec_of(pipeline.bundle, decoder), sink)
    return fragments


def test_its_graphs_are_proven(tiny_causal_bundle: Bundle, tiny_causal_checkpoint: Path) -> None:
    manifest = tiny_causal_bundle.manifest
    assert manifest.tiny_decoder is not None
    loaded = TinyDecoder.load(tiny_causal_checkpoint / TINY_DECODER)
    assert manifest.tiny_decoder.parameters == sum(p.numel() for p in loaded.parameters())
    for name, full in (("tiny_decoder_first", "decoder_first"), ("tiny_decoder_next", "decoder_next")):
        graph = manifest.graphs[name]  # type: ignore[index]  # names of graphs, as text
        assert len(graph.verified_shapes) >= 4
        assert max(error for output, error in graph.parity.items() if output != "frames") <= TOLERANCE
        # Whoever can call the one can call the other.
        tensors = manifest.graphs[full]  # type: ignore[index]  # a name, as text
        assert graph.inputs[0] == tensors.inputs[0]
        assert graph.outputs[0] == tensors.outputs[0]


async def test_videos_are_decoded_by_the_decoder_that_they_ask_for(pipeline: LocalPipeline) -> None:
    full, tiny = await made(pipeline, None), await made(pipeline, "tiny")
    assert [f.frames for f in tiny] == [f.frames for f in full]
    assert all(one.data != other.data for one, other in zip(tiny, full, strict=True))
    # At the same time, each with a cache of its own kind.
    together = await asyncio.gather(made(pipeline, "tiny"), made(pipeline, "full"), made(pipeline, "tiny"))
    assert together == [tiny, full, tiny]


async def test_a_replay_moves_the_small_caches_on(pipeline: LocalPipeline) -> None:
    manifest, spec = pipeline.bundle.manifest, spec_of(pipeline.bundle, "tiny")
    latents = np.random.default_rng(0).standard_normal((manifest.latent.channels, 3, 4, 4), dtype=np.float32)
    chunks = [LatentChunk(index, latents * (1 + index), last=False) for index in range(3)]
    whole = [await pipeline.decoder.decode("one", spec, chunk) for chunk in chunks]
    for chunk in chunks[:2]:
        await pipeline.decoder.replay("two", spec, chunk)
    assert await pipeline.decoder.decode("two", spec, chunks[2]) == whole[2]
    with pytest.raises(LostSession):
        await pipeline.decoder.decode("three", spec, chunks[1])


@pytest.mark.parametrize(("asked", "said"), [("huge", "full or tiny, not the string 'huge'"), (1, "not the number 1")])
def test_what_it_may_be(tiny_causal_bundle: Bundle, asked: object, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        make_spec(tiny_causal_bundle.manifest, "a red ball", decoder=asked)
    assert caught.value.param == "decoder"


async def test_a_model_without_one_says_so(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with served(Service(tiny_bundle, tmp_path).api) as client:
        refused = await client.post("/v1/videos", json={"prompt": "a red ball", "decoder": "tiny"})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("decoder", "invalid_value")
        assert error["message"] == "decoder must be full, not the string 'tiny': tiny has no other."
        assert (await listed(client)) == []
        created = await client.post("/v1/videos", json={"prompt": "a red ball", "decoder": "full"})
        assert created.json()["decoder"] == "full"
        assert (await client.get("/v1/models/tiny")).json()["decoders"] == ["full"]


async def listed(client: httpx.AsyncClient) -> list[object]:
    videos: list[object] = (await client.get("/v1/videos")).json()["data"]
    return videos


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: TinyDecoder(4, (8, 8, 8, 8), blocks=1, patch=2).save(path), "decodes 4 channels to 16 x 16"),
        (lambda path: TinyDecoder(8, widths=(8, 8, 8, 8), blocks=1).save(path), "decodes 8 channels to 8 x 8"),
        (lambda path: path.write_bytes(b"no weights" * 9), "can't be read"),
    ],
)
def test_one_of_another_vae_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, write: Callable[[Path], object], said: str
) -> None:
    from export.settings import CheckpointSettings

    torch.manual_seed(0)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for part in tiny_checkpoint.iterdir():
        (folder / part.name).symlink_to(part)
    write(folder / TINY_DECODER)
    family = open_checkpoint(folder, CheckpointSettings.load(folder).plan(folder))
    with pytest.raises(ExportError, match=said):
        SmallModels.of(folder, family)

"""Other checkpoints than the first: exported, proven, and made into videos by the pipeline that knows none of them."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pipelines import fragments_of
from tiny import BOUNDARY_RATIO, tiny_ltx_vae

from export import parity
from export.checkpoint import export_checkpoint
from export.onnx import ExportError
from export.proof import LEAST_PSNR
from export.settings import CheckpointSettings
from models.bundle import SERVED_GRAPHS, Bundle
from models.families import open_checkpoint
from models.ltx import DecoderFirst
from serving.engines.engine import Array
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.pipeline.denoising import EngineDenoiser
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.stages import VideoSpec

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)


def spec_of(bundle: Bundle, **asked: Any) -> VideoSpec:
    return make_spec(bundle.manifest, "a red ball", **{"seed": 7, "seconds": 1, "rewrite_prompt": False, **asked})


@pytest.mark.parametrize("kind", ["experts", "ltx", "causal", "cogvideox"])
def test_a_bundle_is_proven(kind: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"tiny_{kind}_bundle")
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.family == (kind if kind in ("ltx", "cogvideox") else "wan")
    assert manifest.proof is not None
    assert manifest.proof.reference == ("the same rollout in torch" if kind == "causal" else "diffusers' pipeline")
    assert manifest.proof.psnr_db >= manifest.proof.worst_frame_psnr_db >= LEAST_PSNR
    for name, graph in manifest.graphs.items():
        example, *others = graph.verified_shapes
        assert len(others) >= (4 if name in SERVED_GRAPHS else 3), name
        assert example not in others
        assert any(shape[next(iter(shape))][0] == 1 for shape in others)
        assert graph.mean_error.keys() == graph.parity.keys() - {"streaming"}
        for output in graph.outputs:
            assert graph.mean_error[output.name] <= graph.parity[output.name]
            assert output.name == "frames" or graph.parity[output.name] <= parity.TOLERANCE
        assert graph.seconds is not None
    cell = manifest.latent.spatial
    tried = [shape["latents"][-2:] for shape in manifest.graphs["denoiser"].verified_shapes]
    assert (manifest.limits.max_side // cell,) * 2 in tried
    for name in manifest.graphs:
        model = onnx.load(bundle.path_of(name), load_external_data=False)
        assert not [node for node in model.graph.node if node.op_type.startswith("Scatter")], name


def test_two_experts_are_two_graphs(tiny_experts_bundle: Bundle) -> None:
    manifest = tiny_experts_bundle.manifest
    assert manifest.experts is not None
    assert manifest.experts.boundary_timestep == 1000 * BOUNDARY_RATIO
    assert (manifest.latent.spatial, manifest.latent.temporal) == (8, 4)
    assert manifest.graphs["denoiser"].inputs == manifest.graphs["denoiser_2"].inputs
    shas = [manifest.files[f"{name}.weights"].sha256 for name in ("denoiser", "denoiser_2")]
    assert shas[0] != shas[1]


async def test_each_expert_gets_its_own_timesteps(tiny_experts_bundle: Bundle) -> None:
    seen: dict[str, list[float]] = {"denoiser": [], "denoiser_2": []}

    class Watched(OnnxRuntimeEngine):
        def run(self, feeds: Any) -> dict[str, Array]:
            seen[self._name.removesuffix(".onnx")] += feeds["timestep"].tolist()
            return super().run(feeds)

    engines = [Watched(tiny_experts_bundle.path_of(name)) for name in ("denoiser", "denoiser_2")]
    manifest, spec = tiny_experts_bundle.manifest, spec_of(tiny_experts_bundle, size="64x64")
    async with LocalPipeline.open(tiny_experts_bundle) as opened:
        denoiser = EngineDenoiser(engines[0], manifest, second=engines[1])
        pipeline = LocalPipeline(tiny_experts_bundle, opened.text_encoder, denoiser, opened.decoder)
        made = await fragments_of(pipeline, spec)
        await denoiser.stop()
        assert made == await fragments_of(opened, spec)
    assert len(seen["denoiser"]) + len(seen["denoiser_2"]) == 2 * manifest.sampler.num_inference_steps
    assert min(seen["denoiser"]) >= 1000 * BOUNDARY_RATIO > max(seen["denoiser_2"])
    assert sum(fragment.frames for fragment in made) == manifest.fps + 1


async def test_videos_at_different_noise_share_the_denoiser(tiny_experts_bundle: Bundle) -> None:
    """Sessions on different experts can't share a call; each video is what it is alone."""
    specs = [spec_of(tiny_experts_bundle, size="64x64", num_inference_steps=steps) for steps in (2, 4)]
    async with LocalPipeline.open(tiny_experts_bundle) as pipeline:
        alone = [await fragments_of(pipeline, spec) for spec in specs]
        together = await asyncio.gather(*(fragments_of(pipeline, spec) for spec in specs))
    assert together == alone


async def test_ltx_makes_a_video(tiny_ltx_bundle: Bundle) -> None:
    manifest, spec = tiny_ltx_bundle.manifest, spec_of(tiny_ltx_bundle)
    assert manifest.decodes_with_noise
    async with LocalPipeline.open(tiny_ltx_bundle) as pipeline:
        made = await fragments_of(pipeline, spec)
        assert made == await fragments_of(pipeline, spec)
    assert [fragment.frames for fragment in made] == [9]
    assert manifest.latent.model_dump() == {
        "channels": 8,
        "spatial": 32,
        "temporal": 8,
        "patch": 1,
        "patch_frames": 1,
        "group": 1,
        "streaming": "overlapped",
    }
    assert manifest.sampler.token_shift is not None
    assert manifest.sampler.terminal == 0.1


@pytest.mark.parametrize("newer", [True, False], ids=["0.9.5", "0.9.0"])
def test_both_kinds_of_ltx_decode_as_diffusers_does(newer: bool) -> None:
    torch.manual_seed(4)
    vae, latents = tiny_ltx_vae(newer), torch.randn(2, 8, 3, 2, 3)
    decoder = DecoderFirst(vae, 0.05, 0.025)
    given = (latents, torch.randn_like(latents)) if newer else (latents,)
    with torch.no_grad():
        prepared, timestep = latents * decoder.std + decoder.mean, None
        if newer:
            prepared, timestep = 0.975 * prepared + 0.025 * given[1], torch.full((2,), 0.05)
        expected = vae.decode(prepared, timestep).sample.clamp(-1, 1)
        assert (decoder(*given)[1] - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1


def test_ltx_that_draws_noise_in_its_layers_is_refused(tiny_ltx_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_ltx_checkpoint, tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "vae" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"decoder_inject_noise": [True, False, False, False]})
    )
    with pytest.raises(ExportError, match="draws noise in its layers"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out" / "bundle")
    assert not (tmp_path / "out").exists()


def test_ltx_says_what_its_seams_cost(tiny_ltx_bundle: Bundle) -> None:
    decoder = tiny_ltx_bundle.manifest.graphs["decoder_next"]
    assert "streaming" not in decoder.parity
    assert 0 < decoder.mean_error["seam"] < decoder.parity["seam"]


def test_a_seam_is_local(tiny_ltx_bundle: Bundle, tiny_ltx_checkpoint: Path) -> None:
    """Every frame comes once, at its place: far from the seam, on both sides, decoding in chunks is exact."""
    settings = CheckpointSettings.load(tiny_ltx_checkpoint)
    family = open_checkpoint(tiny_ltx_checkpoint, settings.plan(tiny_ltx_checkpoint))
    sessions = [parity.open_session(tiny_ltx_bundle.path_of(name)) for name in ("decoder_first", "decoder_next")]
    latents = torch.randn(1, 8, 20, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = family.decode(latents).clamp(-1, 1).numpy()
    streamed = np.concatenate(list(parity.stream(*sessions, latents, [10, 10], opening=10)), axis=2)
    assert streamed.shape == whole.shape == (1, 3, 153, 64, 64)
    error = np.abs(streamed - whole).max(axis=(0, 1, 3, 4))
    assert error[0] <= parity.TOLERANCE
    assert error[-24:].max() <= parity.TOLERANCE
    assert 60 <= error.argmax() <= 90

"""CogVideoX: positions that follow the size, pairs of latent frames, and patches in time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from tiny import CHANNELS, MAX_TOKENS, TEXT_DIM, build_tiny_cogvideox, tiny_cogvideox_transformer

from export import parity
from export.checkpoint import export_checkpoint
from export.onnx import ExportError, WeightFile, export_graph
from export.settings import CheckpointSettings
from models.bundle import Bundle
from models.cogvideox import Denoiser
from models.families import open_checkpoint
from serving.pipeline.local import LocalPipeline
from serving.pipeline.request import make_spec
from serving.pipeline.stages import Fragment

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)

ROTARY: dict[str, Any] = {"use_rotary_positional_embeddings": True}
KINDS = [
    {"sample_height": 8, "sample_width": 12, "sample_frames": 9},
    {"sample_height": 8, "sample_width": 12} | ROTARY,
    {"sample_height": 16, "sample_width": 16, "patch_size_t": 2, "patch_bias": False} | ROTARY,
]


@pytest.mark.parametrize("config", KINDS, ids=["2b", "5b", "1.5-5b"])
def test_positions_are_those_of_diffusers_at_any_size(config: dict[str, Any]) -> None:
    torch.manual_seed(1)
    transformer = tiny_cogvideox_transformer(**config)
    denoiser = Denoiser(transformer, 16)

    class Pipeline:
        vae_scale_factor_spatial = 8

    pipeline: Any = Pipeline()
    pipeline.transformer = transformer
    for frames, height, width in [(2, 4, 6), (4, 8, 12), (6, 10, 4), (2, 2, 2), (2, 4, 14), (2, 14, 6)]:
        latents, text = torch.randn(2, CHANNELS, frames, height, width), torch.randn(2, MAX_TOKENS, TEXT_DIM)
        timestep = torch.tensor([999.0, 20.0])
        rotation = None
        if config.get("use_rotary_positional_embeddings"):
            rotation = CogVideoXPipeline._prepare_rotary_positional_embeddings(
                pipeline, 8 * height, 8 * width, frames, torch.device("cpu")
            )
        with torch.no_grad():
            expected = transformer(
                latents.transpose(1, 2), text, timestep, image_rotary_emb=rotation, return_dict=False
            )[0].transpose(1, 2)
            assert (denoiser(latents, timestep, text) - expected).abs().max() <= 1e-5
        assert expected.std() > 0.1


def test_the_older_kind_is_exported_too(tmp_path: Path) -> None:
    """Sines that are added and DDIM; its text encoder and decoder are those of the newer kind."""
    checkpoint = tmp_path / "checkpoint"
    build_tiny_cogvideox(checkpoint)
    settings = CheckpointSettings.load(checkpoint)
    family = open_checkpoint(checkpoint, settings.plan(checkpoint))
    graph = next(graph for graph in family.graphs(settings.plan(checkpoint)) if graph.name == "denoiser")
    export_graph(graph, WeightFile(tmp_path / graph.weights))
    errors = parity.graph_errors(graph, parity.open_session(tmp_path / graph.file))
    assert errors.largest["velocity"] <= parity.TOLERANCE
    sampler = settings.sampler_info(family.scheduler)
    assert (sampler.name, sampler.shift) == ("ddim", 3.0)


def test_the_bundle_says_how_it_is_decoded(tiny_cogvideox_bundle: Bundle) -> None:
    manifest = tiny_cogvideox_bundle.manifest
    assert manifest.latent.model_dump() == {
        "channels": CHANNELS,
        "spatial": 8,
        "temporal": 4,
        "patch": 2,
        "patch_frames": 2,
        "group": 2,
        "streaming": "exact",
    }
    assert [(part.start, part.stop) for part in manifest.chunks(7)] == [(0, 3), (3, 5), (5, 7)]
    assert manifest.sampler.name == "dpm"
    assert manifest.sampler.betas is not None
    assert 0 <= manifest.graphs["decoder_next"].parity["streaming"] <= parity.TOLERANCE
    shapes = {tensor.name: tensor.shape for tensor in manifest.graphs["decoder_next"].inputs}
    assert shapes["latents"] == ("batch", CHANNELS, "2*pairs", "height", "width")


async def test_a_video_is_made_in_pairs(tiny_cogvideox_bundle: Bundle, tiny_cogvideox_checkpoint: Path) -> None:
    fragments: list[Fragment] = []

    async def sink(fragment: Fragment) -> None:
        fragments.append(fragment)

    async with LocalPipeline.open(tiny_cogvideox_bundle) as pipeline:
        spec = make_spec(tiny_cogvideox_bundle.manifest, "a red ball", seed=7, seconds=2)
        await pipeline.generate(spec, sink)
    assert [(fragment.first_frame, fragment.frames) for fragment in fragments] == [(0, 9), (9, 8)]


def refusal(checkpoint: Path, folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        export_checkpoint(checkpoint, folder / "out" / "bundle")
    assert not (folder / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("rushes.json", {"fps": 10}, "`fps` must be a multiple"),
        ("rushes.json", {"chunk_latent_frames": 3}, "`chunk_latent_frames` must be even"),
        ("rushes.json", {"rollout": "causal"}, "no causal rollout"),
        ("transformer/config.json", {"ofs_embed_dim": 8}, "needs an image"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "`prediction_type` must be v_prediction"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "odd"}, "wrong at `spacing`"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "T5EncoderModel"),
    ],
)
def test_what_is_not_understood_is_refused(
    file: str, change: dict[str, Any], words: str, tiny_cogvideox_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_cogvideox_checkpoint, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in refusal(tmp_path / "checkpoint", tmp_path)


def test_the_vae_decodes_what_it_was_given() -> None:
    """The walk is diffusers' own, for every chunking of the pairs."""
    from models.cogvideox import DecoderFirst, DecoderNext

    torch.manual_seed(2)
    vae = AutoencoderKLCogVideoX(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    ).eval()
    first, following = DecoderFirst(vae), DecoderNext(vae)
    latents = torch.randn(2, CHANNELS, 9, 4, 6)
    with torch.no_grad():
        whole = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
        for chunks in [(2, 2, 2), (4, 2), (6,)]:
            _, pixels, *caches = first(latents[:, :, :3])
            streamed, start = [pixels], 3
            for size in chunks:
                _, pixels, *caches = following(latents[:, :, start : start + size], *caches)
                streamed.append(pixels)
                start += size
            torch.testing.assert_close(torch.cat(streamed, dim=2), whole, atol=1e-5, rtol=0)

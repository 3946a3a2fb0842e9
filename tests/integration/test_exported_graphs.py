"""An exported bundle's graphs do what diffusers and transformers do, and its manifest says how that was checked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import WanPipeline
from tiny import CHANNELS, MAX_TOKENS, TEXT_DIM, tiny_vae
from tokenizers import Tokenizer

from export import parity
from export.onnx import ExportError
from models import wan_graphs
from models.bundle import SERVED_GRAPHS, Bundle, GraphName
from models.wan import DecoderFirst, DecoderNext, WanCheckpoint
from models.wan_encoder import GROUP, EncoderFirst, EncoderNext

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Any:
    pipeline = WanPipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Bundle) -> dict[str, Any]:
    return {name: parity.open_session(tiny_bundle.path_of(name), threads=1) for name in tiny_bundle.manifest.graphs}


def denormalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """As `WanPipeline.__call__` does before `vae.decode`."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return latents / std + mean


def in_one_go(vae: Any, latents: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Full decoding in float64: the error that is left is the graph's own, whatever this machine's fp32 kernels do."""
    exact = copy.deepcopy(vae).double()
    with torch.no_grad():
        pixels: np.ndarray[Any, np.dtype[np.float64]] = exact.decode(denormalised(vae, latents).double()).sample.numpy()
    return pixels


def test_the_bundle_is_whole_and_says_what_was_checked(tiny_bundle: Bundle) -> None:
    tiny_bundle.verify()
    manifest = tiny_bundle.manifest
    assert (manifest.name, manifest.fps, manifest.chunk_latent_frames) == ("tiny", 16, 3)
    assert (manifest.text.max_tokens, manifest.text.dim) == (MAX_TOKENS, TEXT_DIM)
    assert manifest.latent.model_dump() == {
        "channels": CHANNELS,
        "spatial": 16,
        "temporal": 4,
        "patch": 2,
        "patch_frames": 1,
        "group": 1,
        "streaming": "exact",
    }
    assert manifest.sampler.model_dump() == {
        "name": "unipc",
        "shift": 3.0,
        "token_shift": None,
        "terminal": None,
        "betas": None,
        "num_train_timesteps": 1000,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }
    assert set(manifest.versions) == {"torch", "diffusers", "transformers", "onnx", "opset"}
    for name, graph in manifest.graphs.items():
        assert set(graph.parity) >= {tensor.name for tensor in graph.outputs}
        assert all(error <= TOLERANCE for output, error in graph.parity.items() if output != "frames")
        assert len(graph.verified_shapes) >= (5 if name in SERVED_GRAPHS else 4)
    for name in ("decoder_next", "encoder_next"):
        assert 0 <= manifest.graphs[name].parity["streaming"] <= TOLERANCE
    assert manifest.preview is not None
    assert manifest.proof is not None
    assert (manifest.proof.reference, manifest.proof.frames) == ("diffusers' pipeline", 13)
    assert manifest.proof.psnr_db >= 45


def test_names_and_types_of_the_graphs(tiny_bundle: Bundle) -> None:
    found = {
        name: (
            {tensor.name: tensor.dtype for tensor in graph.inputs},
            {tensor.name: tensor.dtype for tensor in graph.outputs},
        )
        for name, graph in tiny_bundle.manifest.graphs.items()
    }
    caches = [name for name in found["decoder_first"][1] if name.startswith("cache_")]
    encoder_caches = [name for name in found["encoder_first"][1] if name.startswith("cache_")]
    assert caches == [f"cache_{index:02}" for index in range(len(caches))]
    decoded = {"frames": "uint8", "pixels": "float32"}
    remembered = {"memory": "float32", "memory_mask": "int64"}
    assert found == {
        "text_encoder": ({"input_ids": "int64", "attention_mask": "int64"}, {"hidden_states": "float32"}),
        "denoiser": (
            {"latents": "float32", "timestep": "float32", "encoder_hidden_states": "float32"},
            {"velocity": "float32"},
        ),
        "decoder_first": ({"latents": "float32"}, decoded | dict.fromkeys(caches, "float32")),
        "decoder_next": (
            {"latents": "float32"} | dict.fromkeys(caches, "float32"),
            decoded | {f"next_{name}": "float32" for name in caches},
        ),
        "encoder_first": ({"frames": "float32"}, {"latents": "float32"} | dict.fromkeys(encoder_caches, "float32")),
        "encoder_next": (
            {"frames": "float32"} | dict.fromkeys(encoder_caches, "float32"),
            {"latents": "float32"} | {f"next_{name}": "float32" for name in encoder_caches},
        ),
        "rewriter_encoder": ({"ngrams": "int64"}, remembered),
        "rewriter_decoder": ({"ids": "int64"} | remembered, {"logits": "float32"}),
        "captioner_encoder": ({"latents": "float32"}, remembered),
        "captioner_decoder": ({"ids": "int64"} | remembered, {"logits": "float32"}),
    }
    first, following = (tiny_bundle.manifest.graphs[name] for name in ("decoder_first", "decoder_next"))
    shapes = {tensor.name: tensor.shape for tensor in first.outputs}
    assert {tensor.name: tensor.shape for tensor in following.inputs if tensor.name in caches} == {
        name: shapes[name] for name in caches
    }
    assert all(shapes[name][2] == 2 for name in caches)


def test_the_text_encoder_is_the_pipelines_own(tiny_bundle: Bundle, pipe: Any, sessions: dict[str, Any]) -> None:
    prompts = ["a red ball bouncing", "", "Ein Würfel, der sich dreht " * 9, "猫"]
    tokenizer = Tokenizer.from_file(str(tiny_bundle.tokenizer))
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    ids = [tokens if len(tokens) <= MAX_TOKENS else [*tokens[: MAX_TOKENS - 1], 1] for tokens in ids]
    input_ids = np.array([tokens + [0] * (MAX_TOKENS - len(tokens)) for tokens in ids])
    mask = np.array([[1] * len(tokens) + [0] * (MAX_TOKENS - len(tokens)) for tokens in ids])
    (got,) = sessions["text_encoder"].run(None, {"input_ids": input_ids, "attention_mask": mask})
    with torch.no_grad():
        expected = pipe._get_t5_prompt_embeds([p.strip() for p in prompts], max_sequence_length=MAX_TOKENS).numpy()
    assert np.abs(got - expected).max() <= TOLERANCE
    assert np.ptp(expected) > 0.5
    assert not got[mask == 0].any()


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (1, 9, 8, 8), (3, 2, 2, 6), (2, 5, 6, 4), (5, 3, 4, 4)])
def test_the_denoiser_is_diffusers_transformer(shape: tuple[int, ...], pipe: Any, sessions: dict[str, Any]) -> None:
    batch, *size = shape
    random = torch.Generator().manual_seed(sum(shape))
    latents = torch.randn(batch, CHANNELS, *size, generator=random)
    timestep = torch.rand(batch, generator=random) * 1000
    text = torch.randn(batch, MAX_TOKENS, TEXT_DIM, generator=random)
    # One for each frame, and for diffusers one for each token: TI2V-5B's way.
    timestep = timestep[:, None] * (torch.arange(size[0]) > 0)
    by_token = timestep.repeat_interleave(size[1] * size[2] // 4, dim=1)
    feeds = {"latents": latents, "timestep": timestep, "encoder_hidden_states": text}
    (got,) = sessions["denoiser"].run(None, {name: value.numpy() for name, value in feeds.items()})
    with torch.no_grad():
        expected = pipe.transformer(latents, by_token, text, return_dict=False)[0].numpy()
    assert got.shape == latents.shape
    assert np.abs(got - expected).max() <= TOLERANCE
    assert expected.std() > 0.1


def chunkings(frames: int) -> list[Sequence[int]]:
    return [
        chunks for chunks in ([1] * frames, [3] * (frames // 3), [frames], [1, frames - 1]) if sum(chunks) == frames
    ]


@pytest.mark.parametrize("frames", [1, 2, 3, 9])
@pytest.mark.parametrize("size", [(1, 8, 8), (2, 4, 6)])
def test_streamed_decoding_is_full_decoding(
    frames: int, size: tuple[int, int, int], pipe: Any, sessions: dict[str, Any]
) -> None:
    batch, height, width = size
    latents = torch.randn(batch, CHANNELS, frames, height, width, generator=torch.Generator().manual_seed(frames))
    whole = in_one_go(pipe.vae, latents)
    assert whole.shape == (batch, 3, 1 + 4 * (frames - 1), 16 * height, 16 * width)
    for chunks in chunkings(frames):
        streamed = list(parity.stream(sessions["decoder_first"], sessions["decoder_next"], latents, chunks))
        assert np.abs(np.concatenate(streamed, axis=2) - whole).max() <= TOLERANCE


def test_frames_are_the_pixels_rounded(sessions: dict[str, Any]) -> None:
    latents = np.random.default_rng(0).standard_normal((2, CHANNELS, 1, 4, 2), np.float32)
    frames, pixels = sessions["decoder_first"].run(["frames", "pixels"], {"latents": latents})
    assert frames.dtype == np.uint8
    assert frames.shape == (2, 1, 64, 32, 3)
    expected = np.round((pixels.transpose(0, 2, 3, 4, 1) + 1) * 127.5)
    assert np.abs(frames - expected).max() <= 1
    assert frames.std() > 10


@pytest.fixture(scope="module")
def wan21(tiny_experts_bundle: Bundle, tiny_experts_checkpoint: Path) -> tuple[Any, Any, Any]:
    """The decoder of a Wan 2.1-style VAE (no shortcuts, no patches): its VAE and its two sessions."""
    names: tuple[GraphName, ...] = ("decoder_first", "decoder_next")
    opened = [parity.open_session(tiny_experts_bundle.path_of(name), threads=1) for name in names]
    vae = WanCheckpoint.load(tiny_experts_checkpoint).vae
    assert (vae.config.is_residual, vae.config.patch_size) == (False, None)
    return vae, *opened


@pytest.mark.parametrize("frames", [1, 2, 3, 9])
@pytest.mark.parametrize("size", [(1, 8, 8), (2, 4, 6)])
def test_streamed_decoding_in_the_older_style(
    frames: int, size: tuple[int, int, int], wan21: tuple[Any, Any, Any]
) -> None:
    vae, first, following = wan21
    batch, height, width = size
    latents = torch.randn(batch, CHANNELS, frames, height, width, generator=torch.Generator().manual_seed(frames))
    whole = in_one_go(vae, latents)
    for chunks in chunkings(frames):
        streamed = list(parity.stream(first, following, latents, chunks))
        assert np.abs(np.concatenate(streamed, axis=2) - whole).max() <= TOLERANCE


@pytest.mark.parametrize("residual", [True, False])
def test_the_walk_over_the_decoder_is_exact_in_torch(residual: bool) -> None:
    """One frame a call takes the very same operations as diffusers."""
    torch.manual_seed(2)
    vae = tiny_vae(residual)
    first, following = DecoderFirst(vae), DecoderNext(vae)
    latents = torch.randn(1, CHANNELS, 4, 4, 6)
    with torch.no_grad():
        whole = vae.decode(latents * first.std + first.mean).sample
        _, pixels, *caches = first(latents[:, :, :1])
        streamed = [pixels]
        for index in range(1, 4):
            _, pixels, *caches = following(latents[:, :, index : index + 1], *caches)
            streamed.append(pixels)
    assert torch.equal(torch.cat(streamed, dim=2), whole)


@pytest.mark.parametrize("residual", [True, False], ids=["wan2.2", "wan2.1"])
@pytest.mark.parametrize("count", [1, 5, 13])
def test_streamed_encoding_is_encoding_in_one_go(residual: bool, count: int) -> None:
    vae = tiny_vae(residual)
    side = 32 if residual else 4
    random = torch.Generator().manual_seed(count)
    frames = torch.randint(0, 256, (2, count, 2 * side, side, 3), generator=random, dtype=torch.uint8)
    with torch.no_grad():
        latents, *caches = EncoderFirst(vae)(frames[:, :1])
        streamed = [latents]
        for start in range(1, count, GROUP):
            latents, *caches = EncoderNext(vae)(frames[:, start : start + GROUP], *caches)
            streamed.append(latents)
        whole = vae.encode(frames.float().permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(denormalised(vae, torch.cat(streamed, dim=2)), whole, atol=1e-5, rtol=0)
    assert whole.std() > 0.1


def test_attention_rotates_without_scattering(tiny_bundle: Bundle) -> None:
    model = onnx.load(tiny_bundle.path_of("denoiser"), load_external_data=False)
    assert not [node for node in model.graph.node if node.op_type.startswith("Scatter")]


def test_a_graph_that_differs_from_torch_is_found(tiny_checkpoint: Path, sessions: dict[str, Any]) -> None:
    parts = WanCheckpoint.load(tiny_checkpoint)
    graph = wan_graphs.text_encoder(parts, MAX_TOKENS)
    assert max(parity.graph_errors(graph, sessions["text_encoder"]).largest.values()) <= TOLERANCE
    with torch.no_grad():
        parts.text_encoder.encoder.final_layer_norm.weight[0] *= 1.001
    with pytest.raises(ExportError, match="text_encoder's hidden_states is off by"):
        parity.graph_errors(graph, sessions["text_encoder"])

"""A whole video made twice: by the bundle's graphs, and by what the checkpoint came from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from export import parity
from export.onnx import ExportError
from models.bundle import GraphName, Manifest, ProofInfo
from models.families import Family, Take
from models.graph import Graph
from models.pictures import condition_of, looked_at, with_grey
from models.samplers import advance

Array = NDArray[Any]
# One call of a graph by name, whatever computes it.
Call = Callable[[GraphName, Mapping[str, Array]], dict[str, Array]]

PROMPT = "a red ball bouncing on a sand floor at sunset"
STEPS = 3
LEAST_PSNR, EQUAL_PSNR = 45.0, 100.0
# Enough to see every range of noise.
_CALIBRATION_STEPS = 8
NOTHING_SEEN: Mapping[str, Array] = {}


def prove(family: Family, graphs: Sequence[Graph], manifest: Manifest, folder: Path) -> ProofInfo:
    """Make a short video both ways. Raises `ExportError` if they differ by more than `LEAST_PSNR`."""
    start = time.perf_counter()
    made, take = render(manifest, folder)

    expected: NDArray[Any]
    if manifest.rollout == "causal" or manifest.sampler.name == "renoise":
        reference = "the same rollout in torch"
        modules = {graph.name: graph for graph in graphs}

        def in_torch(name: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
            graph = modules[name]
            outputs = graph.reference(
                {key: torch.from_numpy(np.ascontiguousarray(feeds[key])) for key in graph.example}
            )
            return {key: value.numpy() for key, value in outputs.items()}

        whole = torch.from_numpy(denoise(in_torch, manifest, take, folder / manifest.text.tokenizer))
        with torch.no_grad():
            expected = family.decode(whole)[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5
    else:
        reference = "diffusers' pipeline"
        with torch.no_grad():
            expected = family.make(take)
    psnr, worst = compare(made, _levels(expected))
    if not psnr >= LEAST_PSNR:
        raise ExportError(f"A whole video differs from {reference}: {psnr:.1f} dB, and {LEAST_PSNR:.0f} are needed.")
    return ProofInfo(
        reference=reference,
        size=take.size,
        frames=take.frames,
        steps=take.steps,
        psnr_db=round(psnr, 2),
        worst_frame_psnr_db=round(worst, 2),
        seconds=round(time.perf_counter() - start, 2),
    )


def render(manifest: Manifest, folder: Path) -> tuple[NDArray[np.uint8], Take]:
    """A short video `[frames, height, width, 3]` by the graphs in `folder`, and what was asked of them."""
    take = _take(manifest)
    call = _engines(manifest, folder)
    latents = denoise(call, manifest, take, folder / manifest.text.tokenizer)
    # What seams cost is measured elsewhere: here an overlapped decoder gets everything at once.
    exact, frames = manifest.latent.streaming == "exact", latents.shape[2]
    chunks = [part.stop - part.start for part in manifest.chunks(frames)] if exact else [frames]
    decoders: tuple[GraphName, ...] = ("decoder_first", "decoder_next")
    first, following = (parity.open_session(folder / manifest.graphs[name].file) for name in decoders)
    opening = manifest.latent.first if exact else frames
    noise = take.fresh(take.steps).unsqueeze(0)
    streamed = parity.stream(first, following, torch.from_numpy(latents), chunks, opening=opening, noise=noise)
    return _levels(np.concatenate(list(streamed), axis=2)[0].transpose(1, 2, 3, 0) / 2 + 0.5), take


def rollout_calls(manifest: Manifest, folder: Path, prompts: Sequence[str]) -> dict[GraphName, list[dict[str, Array]]]:
    """Every graph's inputs in short rollouts of these prompts, for what wants to know the values' ranges."""
    call = _engines(manifest, folder)
    calls: dict[GraphName, list[dict[str, Array]]] = {}

    def recorded(name: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        calls.setdefault(name, []).append({key: value.copy() for key, value in feeds.items()})
        return call(name, feeds)

    for seed, prompt in enumerate(prompts):
        take = replace(_take(manifest, seed), prompt=prompt, steps=_CALIBRATION_STEPS)
        denoise(recorded, manifest, take, folder / manifest.text.tokenizer)
    return calls


def _engines(manifest: Manifest, folder: Path) -> Call:
    sessions: dict[GraphName, Any] = {}

    def call(name: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if name not in sessions:
            sessions[name] = parity.open_session(folder / manifest.graphs[name].file)
        outputs = [output.name for output in sessions[name].get_outputs()]
        return dict(zip(outputs, sessions[name].run(outputs, dict(feeds)), strict=True))

    return call


def compare(made: NDArray[np.uint8], expected: NDArray[np.uint8]) -> tuple[float, float]:
    """PSNR in dB of two videos `[frames, height, width, 3]` and of the worst frame; minus infinity for other shapes."""
    if made.shape != expected.shape:
        return float("-inf"), float("-inf")
    squares = ((made.astype(np.float64) - expected) ** 2).mean(axis=(1, 2, 3))

    def psnr(error: float) -> float:
        return float(10 * np.log10(255**2 / error)) if error > 0 else EQUAL_PSNR

    return psnr(float(squares.mean())), psnr(float(squares.max()))


def _seen(call: Call, manifest: Manifest, take: Take, rows: int) -> dict[str, Array]:
    """The inputs that show the take's picture, for every row."""
    if take.picture is None:
        return {}
    frames = np.stack([frame.astype(np.float32) for frame in with_grey(take.picture, take.frames)])[None]
    made = call("encoder_first", {"frames": frames[:, :1]})
    latents = [made.pop("latents")]
    for start in range(1, take.frames, manifest.latent.temporal):
        group = frames[:, start : start + manifest.latent.temporal]
        made = call("encoder_next", {"frames": group, **{n.removeprefix("next_"): v for n, v in made.items()}})
        latents.append(made.pop("latents"))
    condition = condition_of(np.concatenate(latents, axis=2)[0], manifest.latent.temporal)
    seen = {"condition": np.repeat(condition[None], rows, axis=0)}
    if manifest.image is not None:
        pixels = looked_at(take.picture, manifest.image.side)[None]
        states = call("image_encoder", {"pixels": pixels})["image_hidden_states"]
        seen["image_hidden_states"] = np.repeat(states, rows, axis=0)
    return seen


def denoise(call: Call, manifest: Manifest, take: Take, tokenizer_file: Path) -> Array:
    """Latents `[1, channels, frames, height, width]` of the take, by a plain loop over the manifest's sampler."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(take.max_tokens)
    texts = [_encode(call, tokenizer, prompt, take.max_tokens) for prompt in (take.prompt, "")]
    text = np.concatenate(texts if take.guidance_scale > 1 else texts[:1])
    noise = take.noise.numpy()
    if manifest.rollout == "bidirectional":
        latents, _ = _chunk(call, manifest, take, noise, text, {}, _seen(call, manifest, take, len(text)))
        return latents[:, :, _added(manifest, take.frames) :]
    assert manifest.causal is not None
    window, causal, (_, _, frames, height, width) = manifest.window, manifest.causal, noise.shape
    patch, rows = manifest.latent.patch, len(text)
    grid = (height // patch, width // patch)
    cache = np.zeros((rows, causal.layers, 2, window.cached_frames, *grid, causal.dim), np.float32)
    done = []
    for index, start in enumerate(range(0, frames, window.chunk_frames)):
        state = {"cache": cache, "write_index": np.full(rows, index, np.int64)}
        latents, clean = _chunk(call, manifest, take, noise[:, :, start : start + window.chunk_frames], text, state)
        done.append(latents)
        if latents.shape[2] == window.chunk_frames:
            cache[:, :, :, window.frames_of(index)] = clean
    return np.concatenate(done, axis=2)


def _chunk(
    call: Call,
    manifest: Manifest,
    take: Take,
    noise: Array,
    text: Array,
    state: Mapping[str, Array],
    seen: Mapping[str, Array] = NOTHING_SEEN,
) -> tuple[Array, Array | None]:
    """Denoise one run of frames; of a causal model, also what belongs into the cache then."""
    tokens = noise[0, 0].size // manifest.latent.patch**2
    table = take.sampler.table(take.steps, take.guidance_scale, tokens)
    boundary = manifest.experts.boundary_timestep if manifest.experts else 0.0
    rows = len(text)
    x = np.zeros((1 + table.history, *noise.shape[1:]), np.float32)
    x[0] = noise[0]

    def step(graph: GraphName, timestep: float) -> dict[str, Array]:
        feeds: dict[str, Array] = {
            "latents": np.repeat(x[:1], rows, axis=0),
            "timestep": np.full((rows, x.shape[2]) if manifest.timesteps_by_frame else rows, timestep, np.float32),
            "encoder_hidden_states": text,
        }
        if manifest.shape_of(graph, "lora_scales") is not None:
            feeds["lora_scales"] = np.zeros((rows, len(manifest.loras)), np.float32)
        return call(graph, {**feeds, **state, **seen})

    for index, timestep in enumerate(table.timesteps):
        graph: GraphName = "denoiser" if timestep >= boundary else "denoiser_2"
        velocity = step(graph, timestep)["velocity"]
        x = advance(table.coefficients[index], x, velocity[0], velocity[1] if rows > 1 else None)
        if table.noise[index]:
            x[0] += table.noise[index] * _fresh(index, x[0].shape)
    return x[:1], step("denoiser", 0.0)["chunk_cache"] if state else None


def _encode(call: Call, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> Array:
    ids = tokenizer.encode(prompt).ids
    padding = [0] * (max_tokens - len(ids))
    feeds = {"input_ids": np.array([ids + padding]), "attention_mask": np.array([[1] * len(ids) + padding])}
    return call("text_encoder", feeds)["hidden_states"]


def _take(manifest: Manifest, seed: int = 7) -> Take:
    """The smallest size that may be asked for, and a chunk and one latent frame more, or a group of them."""
    latent, limits = manifest.latent, manifest.limits
    cell = latent.spatial * latent.patch
    side = -(-limits.min_side // cell) * latent.patch
    latent_frames = latent.lead + manifest.chunk_latent_frames + latent.group
    frames = 1 + (latent_frames - 1) * latent.temporal
    shape = (latent.channels, _added(manifest, frames) + latent_frames, side, side)
    noise = np.random.default_rng(seed).standard_normal((1, *shape), dtype=np.float32)
    return Take(
        prompt=PROMPT,
        noise=torch.from_numpy(noise),
        steps=STEPS,
        guidance_scale=manifest.sampler.guidance_scale,
        sampler=manifest.sampler,
        max_tokens=manifest.text.max_tokens,
        fps=manifest.fps,
        size=(side * latent.spatial, side * latent.spatial),
        frames=frames,
        fresh=lambda index: torch.from_numpy(_fresh(index, shape)),
        picture=_picture(side * latent.spatial, seed) if manifest.pictured else None,
    )


def _picture(side: int, seed: int) -> NDArray[np.uint8]:
    """Large squares of random colours."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    at = np.arange(side) * 4 // side
    picture: NDArray[np.uint8] = np.ascontiguousarray(squares[at][:, at])
    return picture


def _added(manifest: Manifest, frames: int) -> int:
    """How many latent frames more than a video's own are denoised."""
    return -(1 + (frames - 1) // manifest.latent.temporal) % manifest.latent.patch_frames


def _fresh(index: int, shape: tuple[int, ...]) -> Array:
    """What is added after a step, where a sampler adds noise."""
    return np.random.default_rng(index).standard_normal(shape, dtype=np.float32)


def _levels(frames: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = np.clip(np.rint(frames * 255), 0, 255).astype(np.uint8)
    return levels

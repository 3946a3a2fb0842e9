"""The VAE's training: random crops of rendered clips, reconstruction losses only."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray

from models.mini.networks import build_vae
from models.mini.render import render
from models.mini.scene import FRAMES, HEIGHT, WIDTH, make_scene
from models.mini.training import Run, train
from models.mini.world import draw


def to_tensor(clips: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 `[batch, frames, height, width, 3]` to float `[batch, 3, frames, height, width]` in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def render_pool(path: Path, clips: int, seed: int) -> NDArray[np.uint8]:
    """`clips` training clips `[clips, frames, height, width, 3]`, rendered once and kept on disk."""
    if not path.exists():
        rng = np.random.default_rng(seed)
        fresh = np.lib.format.open_memmap(
            path.with_suffix(".partial"), "w+", np.uint8, (clips, FRAMES, HEIGHT, WIDTH, 3)
        )
        for index in range(clips):
            fresh[index] = render(make_scene(draw(rng), rng))
        path.with_suffix(".partial").rename(path)
    pool: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return pool


def crops(pool: NDArray[np.uint8], rng: np.random.Generator, count: int, frames: int, side: int) -> torch.Tensor:
    """Random crops `[count, 3, frames, side, side]` in [-1, 1]; the busiest of three tries."""
    batch = np.empty((count, frames, side, side, 3), np.uint8)
    for index in range(count):
        best = -1.0
        for _ in range(1 if side == WIDTH else 3):
            clip = pool[rng.integers(len(pool))]
            start = rng.integers(FRAMES - frames + 1)
            y, x = rng.integers(HEIGHT - side + 1), rng.integers(WIDTH - side + 1)
            crop = clip[start : start + frames, y : y + side, x : x + side]
            busy = float(np.abs(np.diff(crop[0, ::4, ::4].astype(np.int16), axis=1)).mean())
            if busy > best:
                best, batch[index] = busy, crop
    return to_tensor(batch)


def trained_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE with its newest averaged weights; the `decoder` stage leaves the encoder as the `vae` stage made it."""
    newest = next(path for stage in ("decoder", "vae") if (path := folder / f"{stage}-averaged.pt").exists())
    vae = build_vae()
    vae.load_state_dict(torch.load(newest, weights_only=True)["vae"])
    return vae


def train_vae(run: Run, decoder_only: bool) -> None:
    """Crops of 64x64 first, whole frames for the last third of the time; fp32 (bf16 3-D convolutions fail on CPUs)."""
    pool = render_pool(run.folder / f"pool-{run.rank}.npy", 400, 10 + run.rank)
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 7])
    vae = build_vae()
    if decoder_only:
        if not run.state_path.exists():
            vae.load_state_dict(torch.load(run.folder / "vae-averaged.pt", weights_only=True)["vae"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    held = _held_out_clips(4)

    def step(index: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        if progress < 0.65 and not decoder_only:
            clip = crops(pool, rng, 4, int(rng.choice([1, 5, 5, 9])), 64)
        else:
            # Whole clips too: a causal convolution that only ever saw a clip's beginning drifts after it.
            count, frames = ((2, 9), (1, FRAMES))[int(rng.random() < 0.8)]
            clip = crops(pool, rng, count, frames, 128)
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(clip).latent_dist
            latents = posterior.mode()
            noisy = latents + 0.03 * torch.randn_like(latents)  # a decoder that forgives the denoiser's small errors
        decoded = vae.decode(noisy).sample
        error = decoded - clip
        pixel, squared = error.abs().mean(), error.square().mean()
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        loss = pixel + 4 * squared + 0.5 * edges
        if not decoder_only:
            loss = loss + 1e-3 * latents.square().mean()  # keeps the latents' scale in reach of the noise above
        return loss, {"l1": pixel.item(), "psnr": 10 * math.log10(4 / squared.item())}

    @torch.no_grad()
    def report(_: int) -> dict[str, float]:
        decoded = vae.decode(vae.encode(held).latent_dist.mode()).sample.clamp(-1, 1)
        return {"held_out_psnr": float(10 * torch.log10(4 / (decoded - held).square().mean((1, 2, 3, 4))).mean())}

    train(run, {"vae": vae}, step, report)


def _held_out_clips(count: int) -> torch.Tensor:
    rng = np.random.default_rng(99)
    clips = [render(make_scene(draw(rng, held_out=True), rng)) for _ in range(count)]
    return to_tensor(np.stack(clips))

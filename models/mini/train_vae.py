"""The VAE's training: random crops of rendered clips, reconstruction losses only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray

from models.mini.networks import build_vae
from models.mini.render import render
from models.mini.scene import FRAMES, HEIGHT, WIDTH, Scene, make_scene
from models.mini.training import Run, train
from models.mini.world import draw


def to_tensor(clips: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 `[batch, frames, height, width, 3]` to float `[batch, 3, frames, height, width]` in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


@dataclass(frozen=True, slots=True)
class Pool:
    """Training clips `[clips, frames, height, width, 3]` uint8 on disk, and the scenes they show."""

    clips: NDArray[np.uint8]
    scenes: list[Scene]

    @classmethod
    def open(cls, path: Path, clips: int, seed: int) -> Pool:
        """Rendered by the first call; a scene is drawn again in no time."""
        rng = np.random.default_rng(seed)
        scenes = [make_scene(draw(rng), rng) for _ in range(clips)]
        if not path.exists():
            partial = path.with_suffix(".partial")
            shape = (clips, FRAMES, HEIGHT, WIDTH, 3)
            fresh = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            for index, scene in enumerate(scenes):
                fresh[index] = render(scene)
            partial.rename(path)
        return cls(np.load(path, mmap_mode="r"), scenes)

    def crops(self, rng: np.random.Generator, count: int, frames: int, side: int) -> torch.Tensor:
        """Random crops `[count, 3, frames, side, side]` in [-1, 1], four in five of them around an object."""
        batch = np.empty((count, frames, side, side, 3), np.uint8)
        for index in range(count):
            which, start = rng.integers(len(self.clips)), rng.integers(FRAMES - frames + 1)
            corner = rng.integers((HEIGHT - side + 1, WIDTH - side + 1))
            if rng.random() < 0.8:
                scene = self.scenes[which]
                body = scene.bodies[rng.integers(len(scene.bodies))]
                x, y = scene.camera.project(body.centers, HEIGHT, WIDTH)[start + frames // 2]
                middle = np.array([y, x]) + rng.uniform(-side / 3, side / 3, 2)
                corner = np.clip(np.nan_to_num(middle) - side / 2, 0, (HEIGHT - side, WIDTH - side)).astype(int)
            y0, x0 = corner
            batch[index] = self.clips[which, start : start + frames, y0 : y0 + side, x0 : x0 + side]
        return to_tensor(batch)


def trained_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE with its newest averaged weights; the `decoder` stage leaves the encoder as the `vae` stage made it."""
    newest = next(path for stage in ("decoder", "vae") if (path := folder / f"{stage}-averaged.pt").exists())
    vae = build_vae()
    vae.load_state_dict(torch.load(newest, weights_only=True)["vae"])
    return vae


def train_vae(run: Run, decoder_only: bool) -> None:
    """Crops of 64x64 first, whole clips among them for the last fifth of the time.

    fp32: 3-D convolutions in bf16 fail on CPUs. Starts from the VAE of the checkpoint `run.start`, if there is one.
    """
    pool = Pool.open(run.folder / f"pool-{run.rank}.npy", 400, 10 + run.rank)
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 7])
    vae = build_vae()
    if run.start and not run.state_path.exists():
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(run.start / "vae").state_dict())
    if decoder_only:
        if not run.state_path.exists():
            vae.load_state_dict(torch.load(run.folder / "vae-averaged.pt", weights_only=True)["vae"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    held = _held_out_clips(4)

    def step(index: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        # By the step's number, so that both workers have equal work.
        if progress < 0.8 or index % 5 < 2:
            clip = pool.crops(rng, 4, (1, 5, 9, 9, 17)[index % 5], 64)
        else:
            # Whole clips too: a causal convolution that only ever saw a clip's beginning drifts after it.
            clip = pool.crops(rng, 1, FRAMES, WIDTH)
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(clip).latent_dist
            latents = posterior.mode()
            noisy = latents + 0.03 * torch.randn_like(latents)  # a decoder that forgives the denoiser's small errors
        decoded = vae.decode(noisy).sample
        error = decoded - clip
        # The first frame has a latent of its own, four others share one: seen rarely, it would stay the worst.
        weight = torch.ones(clip.shape[2])
        weight[0] = 3.0
        weight = (weight / weight.mean())[:, None, None]
        pixel, squared = (weight * error.abs()).mean(), error.square().mean()
        edges = ((weight * error.diff(dim=-1).abs()).mean() + (weight * error.diff(dim=-2).abs()).mean()) / 2
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

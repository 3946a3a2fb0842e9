"""The VAE's training: random crops of rendered clips, reconstruction losses only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from models.mini.networks import build_vae
from models.mini.pool import Pool, as_floats
from models.mini.render import render
from models.mini.scene import FRAMES, WIDTH, make_scene
from models.mini.training import Run, train
from models.mini.world import draw

# Clips that have been rendered meanwhile are taken in every so many steps.
_GROWING = 50


def trained_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE with its newest averaged weights; the `decoder` stage leaves the encoder as the `vae` stage made it."""
    newest = next(path for stage in ("decoder", "vae") if (path := folder / f"{stage}-averaged.pt").exists())
    vae = build_vae()
    vae.load_state_dict(torch.load(newest, weights_only=True)["vae"])
    return vae


def train_vae(run: Run, decoder_only: bool) -> None:
    """Crops of 64x64 first, whole clips among them for the last fifth of the time.

    fp32, on a GPU TF32: 3-D convolutions in bf16 fail on CPUs. Starts from the VAE of the checkpoint `run.start`, if
    there is one.
    """
    if FRAMES in run.rendered:
        pool = Pool.growing(run.rendered[FRAMES], run.device)
    else:
        pool = Pool.open(run.folder / f"pool-{run.rank}.npy", 400, 10 + run.rank, run.device)
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 7])
    vae = build_vae()
    if run.start and not run.state_path.exists():
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(run.start / "vae").state_dict())
    if decoder_only:
        if not run.state_path.exists():
            vae.load_state_dict(torch.load(run.folder / "vae-averaged.pt", weights_only=True)["vae"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    vae.to(run.device)
    held = _held_out_clips(4).to(run.device)
    sizes = run.recipe

    def step(index: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if index % _GROWING == 0:
            pool.grow()
        # By the step's number, so that both workers have equal work.
        if progress < 0.8 or index % 5 < 2:
            clip = pool.crops(rng, sizes.part, (1, 5, 9, 9, 17)[index % 5], 64)
        else:
            # Whole clips too: a causal convolution that only ever saw a clip's beginning drifts after it.
            clip = pool.crops(rng, sizes.whole, FRAMES, WIDTH)
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(clip).latent_dist
            latents = posterior.mode()
            noisy = latents + 0.03 * torch.randn_like(latents)  # a decoder that forgives the denoiser's small errors
        decoded = vae.decode(noisy).sample
        error = decoded - clip
        # The first frame has a latent of its own, four others share one: seen rarely, it would stay the worst.
        weight = torch.ones(clip.shape[2], device=clip.device)
        weight[0] = 3.0
        weight = (weight / weight.mean())[:, None, None]
        pixel, squared = (weight * error.abs()).mean(), error.square().mean()
        edges = ((weight * error.diff(dim=-1).abs()).mean() + (weight * error.diff(dim=-2).abs()).mean()) / 2
        loss = pixel + 4 * squared + 0.5 * edges
        if not decoder_only:
            loss = loss + 1e-3 * latents.square().mean()  # keeps the latents' scale in reach of the noise above
        return loss, {"l1": pixel.detach(), "psnr": 10 * torch.log10(4 / squared.detach())}

    @torch.no_grad()
    def report(_: int) -> dict[str, float]:
        decoded = vae.decode(vae.encode(held).latent_dist.mode()).sample.clamp(-1, 1)
        return {"held_out_psnr": float(10 * torch.log10(4 / (decoded - held).square().mean((1, 2, 3, 4))).mean())}

    train(run, {"vae": vae}, step, report)


def _held_out_clips(count: int) -> torch.Tensor:
    rng = np.random.default_rng(99)
    clips = [render(make_scene(draw(rng, held_out=True), rng)) for _ in range(count)]
    return as_floats(torch.from_numpy(np.stack(clips)))

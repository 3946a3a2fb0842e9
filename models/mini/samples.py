"""Samples drawn while a denoiser learns: plain Euler steps, decoded, laid out on a sheet and judged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from models.mini.captions import canonical
from models.mini.conditioning import Captioned
from models.mini.latents import latent_statistics
from models.mini.networks import FLOW_SHIFT, LATENT_CHANNELS
from models.mini.train_vae import trained_vae
from models.mini.world import draw
from models.wan_causal import CausalDenoiser
from models.window import ContextWindow

Sampler = Callable[[list[str]], torch.Tensor]


def shifted(base: torch.Tensor) -> torch.Tensor:
    """Noise levels of uniform ones: more of them are high."""
    return FLOW_SHIFT * base / (1 + (FLOW_SHIFT - 1) * base)


@torch.no_grad()
def sample(
    text: Captioned, transformer: WanTransformer3DModel, prompts: list[str], frames: int, steps: int, guidance: float
) -> torch.Tensor:
    """Bidirectional samples `[batch, channels, frames, 8, 8]` of normalised latents."""
    states = torch.cat([text(prompts), text([""] * len(prompts))])
    generator = torch.Generator().manual_seed(0)  # the CPU's: samples of every device begin alike
    x = torch.randn(len(prompts), LATENT_CHANNELS, frames, 8, 8, generator=generator).to(states.device)
    for now, then in itertools.pairwise(shifted(torch.linspace(1, 0, steps + 1)).to(states.device)):
        velocity = transformer(
            hidden_states=torch.cat([x, x]),
            timestep=(now * 1000).expand(2 * len(prompts)),
            encoder_hidden_states=states,
            return_dict=False,
        )[0]
        conditional, unconditional = velocity.chunk(2)
        x = x + (then - now) * (unconditional + guidance * (conditional - unconditional))
    return x


@torch.no_grad()
def roll_out(
    text: Captioned,
    transformer: WanTransformer3DModel,
    window: ContextWindow,
    prompts: list[str],
    chunks: int,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Causal samples `[batch, channels, chunks * chunk_frames, 8, 8]`, chunk after chunk over a cache."""
    denoiser = CausalDenoiser(transformer, window)
    generator = torch.Generator().manual_seed(0)
    guided = guidance > 1
    states = torch.cat([text(prompts), text([""] * len(prompts))]) if guided else text(prompts)
    rows = len(states)
    made = []
    cache = None
    for chunk in range(chunks):
        x = torch.randn(len(prompts), LATENT_CHANNELS, window.chunk_frames, 8, 8, generator=generator)
        x = x.to(states.device)
        cache = denoiser.empty_cache(rows, x) if cache is None else cache
        index = torch.full((rows,), chunk, device=x.device)
        for now, then in itertools.pairwise(shifted(torch.linspace(1, 0, steps + 1)).to(x.device)):
            latents = torch.cat([x, x]) if guided else x
            velocity, _ = denoiser(latents, (now * 1000).expand(rows), states, cache, index)
            if guided:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance * (conditional - unconditional)
            x = x + (then - now) * velocity
        _, clean = denoiser(
            torch.cat([x, x]) if guided else x, torch.zeros(rows, device=x.device), states, cache, index
        )
        cache = denoiser.write(cache, clean, chunk)
        made.append(x)
    return torch.cat(made, 2)


@torch.no_grad()
def score_samples(folder: Path, sampler: Sampler, count: int) -> dict[str, float]:
    """The judge's figures on held-out combinations; writes a contact sheet of the samples."""
    from PIL import Image

    from models.mini.figures import accuracies  # wants the judge

    rng = np.random.default_rng(4)
    wanted = [draw(rng, held_out=True) for _ in range(count)]
    x = sampler([canonical(a) for a in wanted])
    vae = trained_vae(folder).to(x.device)
    mean, std = (torch.tensor(v).to(x.device)[None, :, None, None, None] for v in latent_statistics(folder))
    x = x * std + mean
    decoded = torch.cat([vae.decode(part).sample for part in torch.split(x, 8)])
    clips = (decoded.clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
    sheet = np.concatenate([np.concatenate(list(clip[:: len(clip) // 6]), 1) for clip in clips[:12]])
    Image.fromarray(sheet).save(folder / "samples.png")
    return {f"judged_{name}": share for name, share in accuracies(wanted, list(clips)).items()}

"""The denoiser's training: rectified flow on cached latents, the text encoder trained along."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from numpy.typing import NDArray
from torch import nn

from models.mini.captions import build_tokenizer, caption
from models.mini.conditioning import Captioned, start_from
from models.mini.device import placed
from models.mini.latents import Latents, latent_statistics
from models.mini.mixed import mixed
from models.mini.networks import build_transformer
from models.mini.places import CHANNELS
from models.mini.samples import sample, score_samples, shifted
from models.mini.scene import FRAMES
from models.mini.training import Run, train

CAPTION_DROPOUT = 0.1
PROBED_BLOCK = 3
PROBE_WEIGHT = 0.3


def noise_levels(count: int, device: torch.device) -> torch.Tensor:
    """`[count]` stratified logit-normal noise levels, shifted as the sampler's are."""
    uniform = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    return shifted(torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-3, 1 - 1e-3) - 1)))


class Normalised:
    """Cached clips as the denoiser sees them: drawn at random, each channel of mean 0 and variance 1."""

    def __init__(self, folder: Path, frames: int, device: torch.device) -> None:
        data = Latents.load(folder, frames)
        self.attributes = data.attributes
        self._latents, self._labels = placed(data.latents, device), placed(data.labels, device)
        self.count, self.frames = self._latents.shape[0], self._latents.shape[2]
        self._mean, self._std = (
            torch.tensor(values).to(device).view(1, -1, 1, 1, 1) for values in latent_statistics(folder)
        )
        # The sky is easy and the middle is where things move: weigh each place by how much it differs between clips.
        spread = self._latents[:512].float().std(0).mean((0, 1))
        by_frame = torch.ones(self.frames, device=device)
        by_frame[0] = 2.0  # the one latent frame of its kind, and the first that is seen
        self.weight = (0.3 + 0.7 * spread / spread.mean())[None, None, None] * by_frame[:, None, None]

    def draw(self, rng: np.random.Generator, count: int, frames: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Latents `[count, channels, frames, 8, 8]`, a caption each (now and then none), and `token_labels`."""
        chosen = rng.integers(self.count, size=count)
        clean = self.normalised(chosen)[:, :, :frames]
        said = [caption(self.attributes[i], rng) for i in chosen]
        prompts = ["" if rng.random() < CAPTION_DROPOUT else prompt for prompt in said]
        return clean, prompts, self._labels[self._index(chosen), :frames].float()

    def normalised(self, chosen: NDArray[np.int64]) -> torch.Tensor:
        """These clips' latents `[chosen, channels, frames, 8, 8]`."""
        return (self._latents[self._index(chosen)].float() - self._mean) / self._std

    def _index(self, chosen: NDArray[np.int64]) -> torch.Tensor:
        return placed(chosen, self._latents.device)


class Probe(nn.Module):
    """Reads `token_labels` off a middle block of the denoiser; thrown away after training."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        inner = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.head = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, CHANNELS))
        self.seen = torch.empty(0)
        transformer.blocks[PROBED_BLOCK].register_forward_hook(lambda _module, _inputs, output: self._see(output))

    def _see(self, hidden: torch.Tensor) -> None:
        self.seen = hidden

    def loss(self, labels: torch.Tensor) -> torch.Tensor:
        """Squared error against `[batch, frames, rows, columns, CHANNELS]` of the transformer's latest call."""
        error: torch.Tensor = self.head(self.seen) - labels.flatten(1, 3)
        return error.square().sum(-1).mean()


def train_dit(run: Run) -> None:
    """Captions are dropped now and then for guidance.

    From nothing: short clips (17 frames) for the first 60 % of the time, whole ones after.
    """
    data, sizes = Normalised(run.folder, FRAMES, run.device), run.recipe
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 5])
    tokenizer = build_tokenizer()
    text, transformer = Captioned(tokenizer), build_transformer()
    if run.start:
        start_from(run.start, text, transformer)
    else:
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)
    text.to(run.device)
    transformer.to(run.device)
    probe = Probe(transformer).to(run.device)
    denoise = mixed(transformer, run.compile, run.device)

    def step(_: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        frames, batch = (5, sizes.part) if progress < 0.6 and not run.start else (9, sizes.whole)
        clean, prompts, labels = data.draw(rng, batch, frames)
        sigma = noise_levels(batch, run.device)
        noise = torch.randn_like(clean)
        s = sigma[:, None, None, None, None]
        velocity = denoise(
            hidden_states=(1 - s) * clean + s * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=text(prompts),
            return_dict=False,
        )[0]
        flow = (data.weight[:, :, :frames] * (velocity - (noise - clean)).square()).mean()
        places = probe.loss(labels)
        return flow + PROBE_WEIGHT * places, {f"loss{frames}": flow.detach(), "places": places.detach()}

    def report(step: int) -> dict[str, float]:
        if not run.judges(step):
            return {}
        return score_samples(run.folder, lambda prompts: sample(text, transformer, prompts, 9, 16, 2.0), 12)

    train(run, {"text": text, "transformer": transformer, "probe": probe}, step, report)

"""The denoiser's training: rectified flow on cached latents, the text encoder trained along."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer
from torch import nn
from transformers import UMT5EncoderModel

from models.mini.captions import build_tokenizer, canonical, caption
from models.mini.latents import Latents, latent_statistics
from models.mini.networks import (
    FLOW_SHIFT,
    LATENT_CHANNELS,
    TEXT_LENGTH,
    build_text_encoder,
    build_transformer,
)
from models.mini.places import CHANNELS
from models.mini.train_vae import trained_vae
from models.mini.training import Run, train
from models.mini.world import draw

CAPTION_DROPOUT = 0.1
PROBED_BLOCK = 3
PROBE_WEIGHT = 0.3


class Captioned(nn.Module):
    """Token ids to `encoder_hidden_states`, padded with zeros as `WanPipeline` pads them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = build_text_encoder(tokenizer.get_vocab_size())

    def forward(self, prompts: list[str]) -> torch.Tensor:
        rows = [encoding.ids[:TEXT_LENGTH] for encoding in self.tokenizer.encode_batch(prompts)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = (torch.arange(longest)[None] < torch.tensor([len(row) for row in rows])[:, None]).long()
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return nn.functional.pad(hidden, (0, 0, 0, TEXT_LENGTH - longest))


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


def start_from(checkpoint: Path, text: Captioned, transformer: WanTransformer3DModel) -> None:
    """Copy a diffusers checkpoint's weights; words that both tokenizers know keep their embedding."""
    transformer.load_state_dict(WanTransformer3DModel.from_pretrained(checkpoint / "transformer").state_dict())
    known = UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder").state_dict()
    words = Tokenizer.from_file(str(checkpoint / "tokenizer" / "tokenizer.json")).get_vocab()
    state = text.encoder.state_dict()
    for name, value in known.items():
        if value.shape == state[name].shape:
            state[name] = value
            continue
        for word, index in text.tokenizer.get_vocab().items():
            if word in words:
                state[name][index] = value[words[word]]
    text.encoder.load_state_dict(state)


def train_dit(run: Run) -> None:
    """Captions are dropped now and then for guidance.

    From nothing: short clips (17 frames) for the first 60 % of the time, whole ones after.
    """
    data = Latents.load(run.folder)
    mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1, 1) for v in latent_statistics(run.folder))
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 5])
    tokenizer = build_tokenizer()
    text, transformer = Captioned(tokenizer), build_transformer()
    if run.start:
        start_from(run.start, text, transformer)
    else:
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)
    probe = Probe(transformer)
    # The sky is easy and the middle is where things move: weigh each place by how much it differs between clips.
    spread = torch.from_numpy(data.latents[:512].astype(np.float32)).std(0).mean((0, 1))
    weight = (0.3 + 0.7 * spread / spread.mean())[None, None, None]

    def step(_: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        frames, batch = (5, 16) if progress < 0.6 and not run.start else (9, 12)
        chosen = rng.integers(len(data.latents), size=batch)
        clean = torch.from_numpy((data.latents[chosen, :, :frames].astype(np.float32) - mean) / std)
        labels = torch.from_numpy(data.labels[chosen, :frames].astype(np.float32))
        prompts = ["" if rng.random() < CAPTION_DROPOUT else caption(data.attributes[i], rng) for i in chosen]
        # Stratified logit-normal times, shifted towards noise as the sampler's are.
        uniform = (torch.randperm(batch) + torch.rand(batch)) / batch
        sigma = torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-3, 1 - 1e-3) - 1))
        sigma = FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)
        noise = torch.randn_like(clean)
        s = sigma[:, None, None, None, None]
        velocity = transformer(
            hidden_states=(1 - s) * clean + s * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=text(prompts),
            return_dict=False,
        )[0]
        flow = (weight * (velocity - (noise - clean)).square()).mean()
        places = probe.loss(labels)
        return flow + PROBE_WEIGHT * places, {f"loss{frames}": flow.item(), "places": places.item()}

    def report(step: int) -> dict[str, float]:
        if step % (5 * run.save_every):
            return {}
        return score_samples(run.folder, text, transformer, 12)

    train(run, {"text": text, "transformer": transformer, "probe": probe}, step, report)


# Watching it learn ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    text: Captioned, transformer: nn.Module, prompts: list[str], frames: int, steps: int, guidance: float
) -> torch.Tensor:
    """Euler samples `[batch, channels, frames, 8, 8]` of normalised latents."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(prompts), LATENT_CHANNELS, frames, 8, 8, generator=generator)
    states = torch.cat([text(prompts), text([""] * len(prompts))])
    base = torch.linspace(1, 0, steps + 1)
    sigmas = FLOW_SHIFT * base / (1 + (FLOW_SHIFT - 1) * base)
    for now, then in itertools.pairwise(sigmas):
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
def score_samples(folder: Path, text: Captioned, transformer: nn.Module, count: int) -> dict[str, float]:
    """The judge's figures on held-out combinations; writes a contact sheet of the samples."""
    from PIL import Image

    rng = np.random.default_rng(4)
    wanted = [draw(rng, held_out=True) for _ in range(count)]
    vae = trained_vae(folder)
    mean, std = (torch.tensor(v)[None, :, None, None, None] for v in latent_statistics(folder))
    x = sample(text, transformer, [canonical(a) for a in wanted], 9, 16, 3.0) * std + mean
    decoded = torch.cat([vae.decode(part).sample for part in torch.split(x, 8)])
    clips = (decoded.clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    sheet = np.concatenate([np.concatenate(list(clip[::6]), 1) for clip in clips[:12]])
    Image.fromarray(sheet).save(folder / "samples.png")
    from models.mini.evaluate import score  # wants the judge

    accuracies = score(wanted, list(clips)).accuracies()
    return {f"judged_{name}": share for name, share in accuracies.items()}

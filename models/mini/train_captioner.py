"""The captioner's training, on the latents that the denoiser learns from."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from models.mini.captioner import Captioner
from models.mini.captions import canonical, read
from models.mini.latents import Latents, latent_statistics
from models.mini.paraphrases import NAMES, OTHER_NAMES, part
from models.mini.training import Run, train
from models.mini.words import encode
from models.mini.world import Attributes

BATCH = 32
# Standard deviation of the noise on normalised latents, up to: a generator's latents are not quite an encoder's.
NOISE = 0.3
# The last clips of the cache are never trained on, at most a tenth.
HELD_OUT_CLIPS = 400


def train_captioner(run: Run) -> None:
    data = Latents.load(run.folder)
    latents, attributes = data.latents, data.attributes
    mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1, 1) for v in latent_statistics(run.folder))
    kept = min(HELD_OUT_CLIPS, len(latents) // 10)
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 13])
    captioner = Captioner.untrained()
    index = {word: id for id, word in enumerate(captioner.config["words"])}

    def normalised(chosen: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy((latents[chosen].astype(np.float32) - mean) / std)

    def step(_: int, __: float) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = rng.integers(len(latents) - kept, size=BATCH)
        clips = normalised(chosen)
        clips = clips + torch.randn_like(clips) * torch.rand(BATCH, 1, 1, 1, 1) * NOISE
        loss = captioner.loss(clips, [encode(canonical(attributes[i]), index) for i in chosen])
        return loss, {"loss": loss.item()}

    def report(step: int) -> dict[str, float]:
        if step % (5 * run.save_every):
            return {}
        held = np.arange(len(latents) - kept, len(latents))
        captions = [text for i in range(0, kept, 50) for text in captioner.caption(normalised(held[i : i + 50]))]
        return agreement([attributes[i] for i in held], captions)

    train(run, {"captioner": captioner}, step, report)


def agreement(truth: list[Attributes], captions: list[str]) -> dict[str, float]:
    """The share of captions that are right in each attribute, over the clips that have it, and in all of them."""
    right: dict[str, list[bool]] = {"all": []}
    for wanted, text in zip(truth, captions, strict=True):
        got = read(text)
        names = [name for name in NAMES if name != "then" or wanted.then]
        names += [f"other {name}" for name in OTHER_NAMES if wanted.other]
        for name in names:
            right.setdefault(name, []).append(got is not None and part(got, name) == part(wanted, name))
        right["all"].append(got == wanted)
    return {name: float(np.mean(values)) for name, values in right.items()}

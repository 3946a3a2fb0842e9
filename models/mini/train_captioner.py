"""The captioner's training, on the latents that the denoiser learns from."""

from __future__ import annotations

import numpy as np
import torch

from models.mini.captioner import Captioner
from models.mini.captions import canonical, read
from models.mini.paraphrases import NAMES, OTHER_NAMES, part
from models.mini.scene import FRAMES
from models.mini.train_dit import Normalised
from models.mini.training import Run, train
from models.mini.words import encode
from models.mini.world import Attributes

# Standard deviation of the noise on normalised latents, up to: a generator's latents are not quite an encoder's.
NOISE = 0.3
# The last clips of the cache are never trained on, at most a tenth.
HELD_OUT_CLIPS = 400


def train_captioner(run: Run) -> None:
    data = Normalised(run.folder, FRAMES, run.device)
    attributes = data.attributes
    kept = min(HELD_OUT_CLIPS, len(attributes) // 10)
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 13])
    captioner = Captioner.untrained().to(run.device)
    index = {word: id for id, word in enumerate(captioner.config["words"])}
    spoken = [encode(canonical(a), index) for a in attributes]
    batch = run.recipe.part

    def step(_: int, __: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen = rng.integers(len(attributes) - kept, size=batch)
        clips = data.normalised(chosen)
        clips = clips + torch.randn_like(clips) * torch.rand(batch, 1, 1, 1, 1, device=clips.device) * NOISE
        loss = captioner.loss(clips, [spoken[i] for i in chosen])
        return loss, {"loss": loss.detach()}

    def report(step: int) -> dict[str, float]:
        if not (run.judges(step) or run.ended) or not kept:
            return {}
        held = np.arange(len(attributes) - kept, len(attributes))
        captions = [text for i in range(0, kept, 50) for text in captioner.caption(data.normalised(held[i : i + 50]))]
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

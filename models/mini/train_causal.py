"""From a bidirectional denoiser to a causal one, and from many guided steps to four without guidance.

`causal`: noise levels per chunk over the chunks' own noisy past (Diffusion Forcing) or over a clean one (what serving's
cache holds). In the second half of the time the clean past is one that the model itself has made: the true latents,
partly noised and denoised again, so that they carry the model's own errors but still lead to the true next chunk.

`distil`: each of the four steps learns where the causal teacher, with guidance, gets in three smaller ones
(progressive distillation: Salimans & Ho 2022, arXiv:2202.00512; guided: Meng et al. 2023, arXiv:2210.03142).
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from models.mini.captions import build_tokenizer
from models.mini.clips import LONG
from models.mini.conditioning import Captioned
from models.mini.mixed import Call, mixed
from models.mini.networks import build_transformer
from models.mini.samples import roll_out, score_samples, shifted
from models.mini.train_dit import Normalised, noise_levels
from models.mini.training import Run, train
from models.wan_causal import CausalSequence
from models.window import ContextWindow

WINDOW = ContextWindow(chunk_frames=3, sink_chunks=1, window_chunks=3)
FEW_STEPS = 4
TEACHER_STEPS = 3
GUIDANCE = 2.0
CHUNKS = (1 + (LONG - 1) // 4) // WINDOW.chunk_frames
_SCORED_CHUNKS = 3  # as long as the bidirectional clips


def load(run: Run, stage: str) -> tuple[Captioned, WanTransformer3DModel]:
    """The averaged weights that an earlier stage left in the run's folder."""
    text, transformer = Captioned(build_tokenizer()), build_transformer()
    averaged = torch.load(run.folder / f"{stage}-averaged.pt", weights_only=True)
    text.load_state_dict(averaged["text"])
    transformer.load_state_dict(averaged["transformer"])
    return text.to(run.device), transformer.to(run.device)


def noised(clean: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and their noise, for `clean` `[batch, channels, frames, 8, 8]` and `sigma` `[batch, chunks]`."""
    noise = torch.randn_like(clean)
    s = _by_frame(sigma)
    return (1 - s) * clean + s * noise, noise


@torch.no_grad()
def relived(sequence: Call, clean: torch.Tensor, states: torch.Tensor, steps: int = 2) -> torch.Tensor:
    """`clean` as the model would have made it: noised part of the way, by video, and denoised in `steps`."""
    start = torch.empty(len(clean), 1, device=clean.device).uniform_(0.3, 0.8).expand(-1, CHUNKS)
    x, _ = noised(clean, start)
    for now, then in itertools.pairwise(1 - step / steps for step in range(steps + 1)):
        velocity = sequence(x, start * now * 1000, states, clean)
        x = x + (start[:, :1] * (then - now))[..., None, None, None] * velocity
    return x


def train_causal(run: Run) -> None:
    """Starts from the `dit` stage; wants latents of `LONG` frames."""
    data, sizes = Normalised(run.folder, LONG, run.device), run.recipe
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 6])
    text, transformer = load(run, "dit")
    sequence = mixed(CausalSequence(transformer, WINDOW), run.compile, run.device)

    def step(index: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        forcing = index % 10 < 3  # both workers alike: neither waits for the other
        batch = sizes.part if forcing else sizes.whole
        clean, prompts, _labels = data.draw(rng, batch, CHUNKS * WINDOW.chunk_frames)
        states = text(prompts)
        sigma = noise_levels(batch * CHUNKS, run.device).view(batch, CHUNKS)
        noisy, noise = noised(clean, sigma)
        if forcing:
            velocity = sequence(noisy, sigma * 1000, states)
        else:
            past = relived(sequence, clean, states) if progress > 0.5 and index % 2 else clean
            velocity = sequence(noisy, sigma * 1000, states, past)
        loss = (data.weight * (velocity - (noise - clean)).square()).mean()
        return loss, {"forcing" if forcing else "teacher": loss.detach()}

    def report(step: int) -> dict[str, float]:
        if not run.judges(step):
            return {}
        return score_samples(
            run.folder, lambda prompts: roll_out(text, transformer, WINDOW, prompts, _SCORED_CHUNKS, 12, GUIDANCE), 12
        )

    train(run, {"text": text, "transformer": transformer}, step, report)


def train_distil(run: Run) -> None:
    """Starts from the `causal` stage, whose text encoder stays as it is."""
    data, sizes = Normalised(run.folder, LONG, run.device), run.recipe
    rng = np.random.default_rng([run.rank, int(run.state_path.exists()), 8])
    text, taught = load(run, "causal")
    _, transformer = load(run, "causal")
    text.requires_grad_(False)
    taught.requires_grad_(False)
    teacher, student = (
        mixed(CausalSequence(module, WINDOW), run.compile, run.device) for module in (taught, transformer)
    )

    def step(index: int, _: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = sizes.whole
        clean, prompts, _labels = data.draw(rng, batch, CHUNKS * WINDOW.chunk_frames)
        with torch.no_grad():
            states, unsaid = text(prompts), text([""] * batch)
            past = relived(student, clean, states) if index % 2 else clean
            # Which of the four steps, for each chunk, and the teacher's smaller ones on the way.
            first = torch.randint(FEW_STEPS, (batch, CHUNKS), device=run.device)
            path = [shifted(1 - (first + part / TEACHER_STEPS) / FEW_STEPS) for part in range(TEACHER_STEPS + 1)]
            start, _noise = noised(clean, path[0])
            x, twice = start, torch.cat([states, unsaid])
            for now, then in itertools.pairwise(path):
                velocity = teacher(torch.cat([x, x]), torch.cat([now, now]) * 1000, twice, torch.cat([past, past]))
                conditional, unconditional = velocity.chunk(2)
                x = x + _by_frame(then - now) * (unconditional + GUIDANCE * (conditional - unconditional))
            target = (x - start) / _by_frame(path[-1] - path[0])
        velocity = student(start, path[0] * 1000, states, past)
        loss = (data.weight * (velocity - target).square()).mean()
        return loss, {"distilled": loss.detach()}

    def report(step: int) -> dict[str, float]:
        if not run.judges(step):
            return {}
        return score_samples(
            run.folder, lambda prompts: roll_out(text, transformer, WINDOW, prompts, _SCORED_CHUNKS, FEW_STEPS, 1.0), 12
        )

    train(run, {"text": text, "transformer": transformer}, step, report)


def _by_frame(values: torch.Tensor) -> torch.Tensor:
    """`[batch, chunks]` to `[batch, 1, frames, 1, 1]`."""
    return values.repeat_interleave(WINDOW.chunk_frames, 1)[:, None, :, None, None]

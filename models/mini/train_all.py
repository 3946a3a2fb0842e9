"""All stages but the rewriter, one after another in one process and in a given time: `python -m models.mini.train all`.

Meant for a GPU that is there for some minutes. Clips are rendered once, by processes on all other cores, while the VAE
trains on those that there are. What each stage makes is copied out as it goes on: see `models.mini.keep`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from models.mini.clips import LONG, Rendered, rendering
from models.mini.device import peak_memory_gib, recipe
from models.mini.keep import Keep
from models.mini.latents import cache_latents, latent_statistics
from models.mini.scene import FRAMES
from models.mini.train_captioner import train_captioner
from models.mini.train_causal import train_causal, train_distil
from models.mini.train_dit import train_dit
from models.mini.train_tiny_decoder import train_tiny_decoder
from models.mini.train_vae import train_vae
from models.mini.training import Run

SAVE_SECONDS = 60.0


# Each stage's share of the time, in hundredths. What one leaves goes to those after it.
SHARES = {
    "vae": 28,  # all others rest on its latents, soft small objects are its fault, and it waits for clips at first
    "latents": 8,  # no training: at most this long
    "dit": 28,  # learns the world from nothing, and the text encoder along with it
    "captioner": 6,  # a small network whose loss falls fast
    "causal": 16,  # begins with the dit stage's weights, but is what mini-causal was short of
    "distil": 9,  # begins near its teacher; but a step has three guided forward passes more
    "tiny_decoder": 5,  # small, and mostly on crops
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What `train all` is asked for. `minutes`: for everything, from its start. `workers`: processes that render."""

    folder: Path
    keep: Path
    device: torch.device
    minutes: float
    clips: int
    long_clips: int
    workers: int
    start: Path | None = None
    compile: bool = False


def train_all(plan: Plan) -> None:
    """Raises `FileExistsError` when there is a run in the folder: this one would go on with its weights."""
    begun = time.monotonic()
    plan.folder.mkdir(parents=True, exist_ok=True)
    if any(plan.folder.iterdir()):
        raise FileExistsError(f"{plan.folder} isn't empty: `train all` begins anew, in a folder of its own")
    keep = Keep(plan.folder, plan.keep)
    torch.manual_seed(1000)
    with rendering(plan.folder, {FRAMES: plan.clips, LONG: plan.long_clips}, plan.workers) as rendered:
        for stage in SHARES:
            left = begun + 60 * plan.minutes - time.monotonic()
            seconds = left * _share(stage)
            if seconds <= 0:
                _log(keep, f"{stage}: no time left")
                continue
            run = Run(
                plan.folder,
                stage,
                seconds / 60,
                learning_rate=recipe(plan.device, stage).learning_rate,
                start=plan.start,
                compile=plan.compile,
                device=plan.device,
                begun=time.monotonic(),
                save_seconds=SAVE_SECONDS,
                keep=keep,
                rendered=rendered,
            )
            _log(keep, _one(run, rendered))


def _share(stage: str) -> float:
    """Of the time that is left when it begins."""
    names = list(SHARES)
    return SHARES[stage] / sum(SHARES[name] for name in names[names.index(stage) :])


def _one(run: Run, rendered: dict[int, Rendered]) -> str:
    """One stage, and what is told of it. A stage that fails leaves what it saved, and the next ones go on."""
    stages: dict[str, Callable[[Run], None]] = {
        "vae": partial(train_vae, decoder_only=False),
        "latents": partial(_cache_all, rendered=rendered),
        "dit": train_dit,
        "captioner": train_captioner,
        "causal": train_causal,
        "distil": train_distil,
        "tiny_decoder": train_tiny_decoder,
    }
    begun, failure = time.monotonic(), ""
    try:
        stages[run.stage](run)
    except Exception as error:
        failure = f", failed: {type(error).__name__}: {error}".splitlines()[0]
    gc.collect()
    told = [f"{run.steps} steps"] if run.steps else []
    told += [f"{time.monotonic() - begun:.0f} s", f"{peak_memory_gib(run.device):.1f} GiB of GPU memory"]
    if run.stage in ("vae", "latents"):
        told += [f"{part.ready()} clips of {frames} frames rendered" for frames, part in rendered.items()]
    if run.history:
        told += [f"{name} {value:.4g}" for name, value in run.history[-1].items() if name not in ("step", "seconds")]
    ended = ", stopped: no finite gradients any more" if run.diverged else ""
    return f"{run.stage}: {', '.join(told)}{ended}{failure}"


def _cache_all(run: Run, rendered: dict[int, Rendered]) -> None:
    """Latents of all clips that there are by now; the long ones get their half of the time at least."""
    begun = time.monotonic()
    for part, share in ((rendered[FRAMES], 0.5), (rendered[LONG], 1.0)):
        cache_latents(run, part.ready(), part.frames, begun + 60 * run.minutes * share)
    latent_statistics(run.folder)


def _log(keep: Keep, line: str) -> None:
    print(line, flush=True)
    with (keep.folder / "all.log").open("a") as log:
        log.write(line + "\n")
    keep.rest()

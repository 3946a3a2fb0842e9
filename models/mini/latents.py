"""Clips as the VAE's latents, rendered and encoded once, and what they show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.mini.places import token_labels
from models.mini.render import render
from models.mini.scene import FRAMES, Scene, make_scene
from models.mini.train_vae import to_tensor, trained_vae
from models.mini.training import Run
from models.mini.world import Attributes, draw

LONG = 69  # frames: six chunks of a causal rollout, more than its window holds
BLOCK = 8  # clips a file


def folder_of(folder: Path, frames: int) -> Path:
    return folder / f"latents-{frames}"


def clips_of(first: int, frames: int) -> tuple[list[Attributes], list[Scene]]:
    """What the file of latents that begins with clip number `first` is of."""
    rng = np.random.default_rng([first, frames])
    attributes = [draw(rng) for _ in range(BLOCK)]
    return attributes, [make_scene(a, rng, frames) for a in attributes]


@torch.no_grad()
def cache_latents(run: Run, clips: int, frames: int) -> None:
    """Render and encode this worker's share of `clips`, `frames` pixel frames each; an earlier call's are kept."""
    vae = trained_vae(run.folder)
    for first in range(run.rank * BLOCK, clips, run.workers * BLOCK):
        path = folder_of(run.folder, frames) / f"{first:06d}.npz"
        if path.exists():
            continue
        attributes, scenes = clips_of(first, frames)
        batch = to_tensor(np.stack([render(scene) for scene in scenes]))
        latents = vae.encode(batch).latent_dist.mode().to(torch.float16).numpy()
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(
                file,
                latents=latents,
                attributes=json.dumps([a.to_json() for a in attributes]),
                labels=np.stack([token_labels(scene) for scene in scenes]).astype(np.float16),
            )
        partial.replace(path)
        if run.rank == 0:
            print(f"latents {first}/{clips}", flush=True)


@dataclass(frozen=True, slots=True)
class Latents:
    """Cached clips `[clips, channels, frames, height, width]`, what they show, and their `token_labels`."""

    latents: NDArray[np.float16]
    attributes: list[Attributes]
    labels: NDArray[np.float16]

    @classmethod
    def load(cls, folder: Path, frames: int = FRAMES) -> Latents:
        """Those of `frames` pixel frames. Raises `FileNotFoundError` when there are none."""
        files = [np.load(path) for path in sorted(folder_of(folder, frames).glob("*.npz"))]
        if not files:
            raise FileNotFoundError(f"no latents of {frames} frames in {folder}: run the latents stage first")
        attributes = [Attributes.from_json(row) for file in files for row in json.loads(str(file["attributes"]))]
        latents, labels = (np.concatenate([file[name] for file in files]) for name in ("latents", "labels"))
        return cls(latents, attributes, labels)


def latent_statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel; fixed by the first call, so that the cache may grow."""
    path = folder / "latent-statistics.json"
    if not path.exists():
        sample = Latents.load(folder).latents[:512].astype(np.float32)
        path.write_text(json.dumps([sample.mean((0, 2, 3, 4)).tolist(), sample.std((0, 2, 3, 4)).tolist()]))
    mean, std = json.loads(path.read_text())
    return mean, std

"""Clips as the VAE's latents, rendered and encoded once, and what they show."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.mini import clips
from models.mini.device import placed
from models.mini.keep import read_kept
from models.mini.places import token_labels
from models.mini.pool import as_floats
from models.mini.render import render
from models.mini.scene import FRAMES
from models.mini.train_vae import trained_vae
from models.mini.training import Run
from models.mini.world import Attributes


def folder_of(folder: Path, frames: int) -> Path:
    return folder / f"latents-{frames}"


@torch.no_grad()
def cache_latents(run: Run, count: int, frames: int, until: float = math.inf) -> None:
    """Render and encode this worker's share of `count` clips, `frames` pixel frames each; an earlier call's are kept.

    Of `run.rendered` if it has clips of that length. Ends early at the moment `until` of `time.monotonic`.
    """
    vae = trained_vae(run.folder).to(run.device)
    block, rendered = clips.BLOCK, run.rendered.get(frames)
    wanted = [
        first
        for first in range(run.rank * block, count, run.workers * block)
        if not _path(run.folder, frames, first).exists()
    ]
    together = max(1, run.recipe.whole // block)
    for firsts in (wanted[at : at + together] for at in range(0, len(wanted), together)):
        blocks = [_pictures(first, frames, rendered) for first in firsts]
        batch = as_floats(placed(np.concatenate([pictures for pictures, _ in blocks]), run.device))
        latents = vae.encode(batch).latent_dist.mode().to(torch.float16).cpu().numpy()
        for first, part, (_, labels) in zip(firsts, np.split(latents, len(firsts)), blocks, strict=True):
            _write(_path(run.folder, frames, first), part, clips.clips_of(first, frames)[0], labels)
        if run.rank == 0:
            print(f"latents {firsts[-1]}/{count}", flush=True)
        if time.monotonic() > until:
            break


def _path(folder: Path, frames: int, first: int) -> Path:
    return folder_of(folder, frames) / f"{first:06d}.npz"


def _pictures(
    first: int, frames: int, rendered: clips.Rendered | None
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """A block's clips and their `token_labels`."""
    if rendered:
        block = slice(first, first + clips.BLOCK)
        return rendered.pictures[block], rendered.labels[block]
    _, scenes = clips.clips_of(first, frames)
    labels = np.stack([token_labels(scene) for scene in scenes]).astype(np.float16)
    return np.stack([render(scene) for scene in scenes]), labels


def _write(path: Path, latents: NDArray[np.float16], attributes: list[Attributes], labels: NDArray[np.float16]) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, latents=latents, attributes=json.dumps([a.to_json() for a in attributes]), labels=labels)
    partial.replace(path)


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
    name = "latent-statistics.json"
    try:
        mean, std = json.loads(read_kept(folder, name))
    except FileNotFoundError:
        sample = Latents.load(folder).latents[:512].astype(np.float32)
        mean, std = sample.mean((0, 2, 3, 4)).tolist(), sample.std((0, 2, 3, 4)).tolist()
        (folder / name).write_text(json.dumps([mean, std]))
    return mean, std

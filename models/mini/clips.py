"""The clips that latents are cached of: which they are, and worker processes that render them while others train.

`python -m models.mini.clips FOLDER FRAMES:CLIPS ...` is such a worker. Imports no torch: a worker starts at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.mini.places import CELL, CHANNELS, token_labels
from models.mini.render import render
from models.mini.scene import HEIGHT, WIDTH, Scene, make_scene
from models.mini.world import Attributes, draw

LONG = 69  # frames: six chunks of a causal rollout, more than its window holds
BLOCK = 8  # clips a file


def clips_of(first: int, frames: int) -> tuple[list[Attributes], list[Scene]]:
    """What the file of latents that begins with clip number `first` is of."""
    rng = np.random.default_rng([first, frames])
    attributes = [draw(rng) for _ in range(BLOCK)]
    return attributes, [make_scene(a, rng, frames) for a in attributes]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Clips of one length on disk, shared between processes; a block is there when its mark in `done` is set.

    `pictures` uint8 `[clips, frames, height, width, 3]`, `labels` the clips' `token_labels`, `done` `[blocks]`.
    """

    frames: int
    pictures: NDArray[np.uint8]
    labels: NDArray[np.float16]
    done: NDArray[np.bool_]

    @classmethod
    def open(cls, folder: Path, frames: int, clips: int, *, fresh: bool = False) -> Rendered:
        """`clips` is rounded up to whole blocks. `fresh`: begin the files anew."""
        blocks = -(-clips // BLOCK)

        def mapped(name: str, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
            path = folder / f"{name}-{frames}.npy"
            return np.lib.format.open_memmap(path, "w+" if fresh else "r+", dtype, shape if fresh else None)

        latent_frames = 1 + (frames - 1) // 4
        return cls(
            frames,
            mapped("pictures", np.uint8, blocks * BLOCK, frames, HEIGHT, WIDTH, 3),
            mapped("labels", np.float16, blocks * BLOCK, latent_frames, HEIGHT // CELL, WIDTH // CELL, CHANNELS),
            mapped("done", np.bool_, blocks),
        )

    def ready(self) -> int:
        """How many clips there are, up to the first that is missing."""
        return BLOCK * (len(self.done) if self.done.all() else int(np.argmin(self.done)))

    def scenes(self) -> list[Scene]:
        """Those of all clips, there or not."""
        return [scene for first in range(0, len(self.pictures), BLOCK) for scene in clips_of(first, self.frames)[1]]

    def render(self, block: int) -> None:
        for index, scene in enumerate(clips_of(block * BLOCK, self.frames)[1], block * BLOCK):
            self.pictures[index] = render(scene)
            self.labels[index] = token_labels(scene)
        self.done[block] = True


@contextmanager
def rendering(folder: Path, clips: Mapping[int, int], workers: int) -> Iterator[dict[int, Rendered]]:
    """Clips by their frames, which `workers` processes render until all are there or the context ends.

    `clips`: how many of each number of frames. Enters when there is a block of each. Raises `RuntimeError` when a
    worker fails before that.
    """
    rendered = {frames: Rendered.open(folder, frames, count, fresh=True) for frames, count in clips.items()}
    command = [sys.executable, "-m", "models.mini.clips", str(folder), *(f"{f}:{count}" for f, count in clips.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, "--worker", str(worker), "--workers", str(workers)], env=environment)
        for worker in range(workers)
    ]
    try:
        while not all(part.ready() for part in rendered.values()):
            if any(process.poll() for process in processes):
                raise RuntimeError("a process that renders clips has failed")
            time.sleep(0.05)
        yield rendered
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def follow_parent(parent: int) -> None:
    """A killed parent takes its workers with it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("clips", nargs="+", help="FRAMES:CLIPS")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    threading.Thread(target=follow_parent, args=(os.getppid(),), daemon=True).start()
    lengths = [Rendered.open(options.folder, *map(int, text.split(":"))) for text in options.clips]
    # One block of each, and then all lengths grow alike, so that whenever it ends there are some of each.
    blocks = sorted(
        (block > 0, block / len(part.done), at, block)
        for at, part in enumerate(lengths)
        for block in range(len(part.done))
    )
    for *_, at, block in blocks[options.worker :: options.workers]:
        lengths[at].render(block)


if __name__ == "__main__":
    main()

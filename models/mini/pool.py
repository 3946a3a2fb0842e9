"""Clips to cut random pieces from, on the device where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.mini.clips import Rendered
from models.mini.device import placed
from models.mini.render import render
from models.mini.scene import FRAMES, HEIGHT, WIDTH, Scene, make_scene
from models.mini.world import draw


def as_floats(clips: torch.Tensor) -> torch.Tensor:
    """uint8 `[batch, frames, height, width, 3]` to float `[batch, 3, frames, height, width]` in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def cut(
    clips: torch.Tensor, which: torch.Tensor, start: torch.Tensor, corner: torch.Tensor, frames: int, side: int
) -> torch.Tensor:
    """Pieces `[batch, frames, side, side, 3]` of the clips `which` `[batch]`, which begin at frames `start` `[batch]`
    and pixels `corner` `[batch, 2]`, y before x."""
    along, across = (torch.arange(length, device=clips.device) for length in (frames, side))
    time, y, x = start[:, None] + along, corner[:, :1] + across, corner[:, 1:] + across
    return clips[which[:, None, None, None], time[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]


class Pool:
    """Training clips uint8 `[clips, frames, height, width, 3]` and the scenes they show.

    `ready`: how many of `source` there are by now. They are copied to the device by `grow`.
    """

    def __init__(
        self, source: NDArray[np.uint8], scenes: list[Scene], device: torch.device, ready: Callable[[], int]
    ) -> None:
        self._source, self._ready = torch.from_numpy(source), ready
        shared = device.type == "cpu"
        self.clips = self._source if shared else torch.empty(source.shape, dtype=torch.uint8, device=device)
        self.count = 0
        self._objects = np.array([len(scene.bodies) for scene in scenes])
        # Where each object's middle is in the picture, y before x.
        self._middles = np.zeros((len(scenes), 2, source.shape[1], 2), np.float32)
        for places, scene in zip(self._middles, scenes, strict=True):
            for place, body in zip(places, scene.bodies, strict=False):
                place[:] = scene.camera.project(body.centers, HEIGHT, WIDTH)[:, ::-1]
        self.grow()

    @classmethod
    def open(cls, path: Path, clips: int, seed: int, device: torch.device) -> Pool:
        """Clips of their own, rendered by the first call; a scene is drawn again in no time."""
        rng = np.random.default_rng(seed)
        scenes = [make_scene(draw(rng), rng) for _ in range(clips)]
        if not path.exists():
            partial = path.with_suffix(".partial")
            shape = (clips, FRAMES, HEIGHT, WIDTH, 3)
            fresh = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            for index, scene in enumerate(scenes):
                fresh[index] = render(scene)
            partial.rename(path)
        # Copied on writing, which never happens: of a read-only array PyTorch makes no tensor without a warning.
        return cls(np.load(path, mmap_mode="c"), scenes, device, lambda: clips)

    @classmethod
    def growing(cls, rendered: Rendered, device: torch.device) -> Pool:
        """Clips that are still being rendered."""
        return cls(rendered.pictures, rendered.scenes(), device, rendered.ready)

    def grow(self) -> None:
        """Take in what has come since."""
        count = self._ready()
        if self.clips is not self._source and count > self.count:
            self.clips[self.count : count].copy_(self._source[self.count : count])
        self.count = count

    def crops(self, rng: np.random.Generator, count: int, frames: int, side: int) -> torch.Tensor:
        """Random crops `[count, 3, frames, side, side]` in [-1, 1], four in five of them around an object."""
        room = np.array([HEIGHT - side, WIDTH - side])
        which = rng.integers(self.count, size=count)
        start = rng.integers(self.clips.shape[1] - frames + 1, size=count)
        corner = rng.integers(room + 1, size=(count, 2))
        middle = self._middles[which, rng.integers(self._objects[which]), start + frames // 2]
        middle = np.nan_to_num(middle + rng.uniform(-side / 3, side / 3, (count, 2)))
        around = np.clip(middle - side / 2, 0, room).astype(np.int64)
        corner = np.where(rng.random((count, 1)) < 0.8, around, corner)
        clip, at, where = (placed(values, self.clips.device) for values in (which, start, corner))
        return as_floats(cut(self.clips, clip, at, where, frames, side))

"""What each of the denoiser's tokens shows, as a second target for its middle layer.

A denoiser learns from pixels' error alone only slowly which words belong to which place: a wrong shape costs it a few
soft edges. Asked in training to say what will be where, it learns that from the start (in the spirit of REPA, Yu et al.
2025, arXiv:2410.06940, with the world's own truth in place of another network's features).
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from models.mini.rays import FloatArray, Shape, array
from models.mini.scene import HEIGHT, WIDTH, Body, Scene
from models.mini.world import OBJECT_RGB, RADIUS, Other

CELL = 32  # pixels a token, both ways: 16 a latent cell, two cells a token
_STEP = 4
CHANNELS = len(get_args(Shape)) + len(OBJECT_RGB) + len(RADIUS) + 2


def token_labels(scene: Scene) -> FloatArray:
    """`[latent frames, rows, columns, CHANNELS]`: each object's share of the cell times what it is and how it moves.

    What it is: shape, colour and size one-hot; then its velocity in cells a latent frame, x and y.
    """
    y, x = np.meshgrid(np.arange(_STEP / 2, HEIGHT, _STEP), np.arange(_STEP / 2, WIDTH, _STEP), indexing="ij")
    shown = np.zeros((scene.frames, *y.shape, CHANNELS), np.float32)
    a = scene.attributes
    kinds: list[tuple[Body, str, str, str]] = [(scene.bodies[0], a.shape, a.color, a.size)]
    if isinstance(a.other, Other):
        kinds.append((scene.bodies[1], a.other.shape, a.other.color, a.other.size))

    def distance(body: Body) -> float:
        return float(np.linalg.norm(body.centers - scene.camera.positions, axis=-1).mean())

    for body, shape, color, size in sorted(kinds, key=lambda kind: -distance(kind[0])):
        middle = scene.camera.project(body.centers, HEIGHT, WIDTH)
        top = scene.camera.project(body.centers + array([0, body.radius, 0]), HEIGHT, WIDTH)
        reach = np.abs(top - middle)[:, 1, None, None]
        inside = np.maximum(abs(x - middle[:, 0, None, None]), abs(y - middle[:, 1, None, None])) < reach
        features = np.zeros((scene.frames, CHANNELS), np.float32)
        names = [*get_args(Shape), *OBJECT_RGB, *RADIUS]
        for name in (shape, color, size):
            features[:, names.index(name)] = 1
        features[:, -2:] = np.clip(np.gradient(middle, axis=0) * 4 / CELL, -1, 1)
        shown = np.where(inside[..., None], features[:, None, None], shown)
    rows, columns, per = HEIGHT // CELL, WIDTH // CELL, CELL // _STEP
    cells = shown.reshape(scene.frames, rows, per, columns, per, CHANNELS).mean((2, 4))
    rest = cells[1:].reshape(-1, 4, rows, columns, CHANNELS).mean(1)
    return np.concatenate([cells[:1], rest])

"""Outlines: how far an object reaches in each direction, and which of the world's shapes reaches so.

Outlines are kept in the still camera's frame: lengths in frame heights from the middle, y down. As every camera of the
world has the same height, pitch and distance, a zoom only scales an outline, and pans and orbits only move it about.
Directions in which the frame's edge or a nearer object hides the outline's end are told from the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from models.mini import rays
from models.mini.camera import FOV, Camera
from models.mini.rays import FloatArray, Shape, array
from models.mini.world import RADIUS, Size

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

SHAPES: tuple[Shape, ...] = get_args(Shape)
SIZES: tuple[Size, ...] = get_args(Size)
_ANGLES = np.linspace(0, 2 * np.pi, 32, endpoint=False, dtype=np.float32)
_RAYS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])  # [2, angles]
RIGHT, DOWN, LEFT, UP = 0, 8, 16, 24
_LEAST_KNOWN = 0.25  # of the directions: less of an outline says nothing


@dataclass(frozen=True, slots=True)
class Outlines:
    """An object's outline in the frames where enough of it is seen."""

    frames: IntArray  # [seen]
    supports: FloatArray  # [seen, angles]: how far it reaches in each direction from the frame's middle
    known: BoolArray  # [seen, angles]: false where something hides how far it reaches

    @property
    def reliable(self) -> BoolArray:
        """The frames `[seen]` that show nearly all, or the best there are."""
        share = self.known.mean(-1)
        for least in (0.8, 0.45):
            if (share > least).sum() >= max(5, 0.7 * len(share)):
                return np.asarray(share > least)
        return np.asarray(share >= np.sort(share)[-min(5, len(share))])


@dataclass(frozen=True, slots=True)
class Match:
    """The shape that outlines fit, how badly (relative to their width), and the outlines completed by it."""

    shape: Shape
    error: float
    outlines: Outlines


def trace(mask: BoolArray, hidden_by: BoolArray | None, camera: Camera) -> Outlines | None:
    """Outlines of a mask `[frames, height, width]`; `None` where it is hardly ever seen.

    `hidden_by` is the mask of a nearer object.
    """
    frames, height, width = mask.shape
    zoom = np.tan(np.radians(camera.fov_degrees) / 2) / np.tan(np.radians(FOV) / 2)
    covered = None if hidden_by is None else _grown(hidden_by, 2)
    seen, supports, known = [], [], []
    for index in range(frames):
        y, x = np.nonzero(mask[index] & ~_inner(mask[index]))
        if mask[index].sum() < 1.5e-3 * height * height:
            continue
        corners = np.concatenate([np.stack([x + dx, y + dy], -1) for dx, dy in product((0, 1), repeat=2)])
        reach = (corners - np.array([width / 2, height / 2])) @ _RAYS
        ends = reach.argmax(0)
        at_x, at_y = corners[ends].T
        inside = (at_x > 1) & (at_x < width - 1) & (at_y > 1) & (at_y < height - 1)
        if covered is not None:
            pixels = np.tile(np.stack([x, y], -1), (4, 1))[ends]
            inside &= ~covered[index, pixels[:, 1], pixels[:, 0]]
        if inside.mean() < _LEAST_KNOWN:
            continue
        seen.append(index)
        supports.append(reach.max(0) / height * zoom[index])
        known.append(inside)
    if len(seen) < max(2, frames // 4):
        return None
    return Outlines(np.array(seen), array(supports), np.array(known))


def _inner(mask: BoolArray) -> BoolArray:
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _grown(mask: BoolArray, by: int) -> BoolArray:
    grown = mask.copy()
    for axis in (1, 2):
        still = grown.copy()
        for step in range(1, by + 1):
            before, after = [slice(None)] * 3, [slice(None)] * 3
            before[axis], after[axis] = slice(None, -step), slice(step, None)
            grown[tuple(before)] |= still[tuple(after)]
            grown[tuple(after)] |= still[tuple(before)]
    return grown


@cache
def _surface(shape: Shape) -> FloatArray:
    """Points `[points, 3]` whose convex hull is the shape with radius 1 around the origin."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.zeros_like(turn), np.sin(turn)], -1)
    match shape:
        case "ball":
            slices = np.linspace(-1, 1, 25)[:, None, None]
            return array(circle * np.sqrt(1 - slices**2) + slices * [0, 1, 0]).reshape(-1, 3)
        case "cube":
            return array(list(product((-1, 1), repeat=3)))
        case "cylinder":
            return array(np.concatenate([0.85 * circle + [0, 1, 0], 0.85 * circle - [0, 1, 0]]))
        case "cone":
            return array(np.concatenate([circle - [0, 1, 0], [[0, 1, 0]]]))


def _project(shape: Shape, radius: float, center: tuple[float, float, float], yaw: float) -> FloatArray:
    """Support function `[angles]`, in frame heights, of an outline as the still camera sees it."""
    points = _surface(shape)
    turned = rays.turn(points, np.full(len(points), yaw, np.float32)) * radius + array(center)
    seen = Camera.still(1).project(turned[:, None], 1, 1)[:, 0] - 0.5
    return np.asarray((seen @ _RAYS).max(0), np.float32)


@cache
def _templates() -> tuple[IntArray, FloatArray]:
    """Index into `SHAPES` and outline `[templates, angles]`, of mean width 1, over places, sizes and yaws."""
    kinds, outlines = [], []
    for kind, shape in enumerate(SHAPES):
        yaws = np.linspace(0, np.pi / 2, 12, endpoint=False) if shape == "cube" else [0.0]
        for yaw, size, x, z, lift in product(yaws, SIZES, (-2.2, -1.1, 0, 1.1, 2.2), (-4, -1.5, 0.3, 1.8), (0, 0.9)):
            radius = RADIUS[size]
            outline = _project(shape, radius, (x, radius + lift, z), float(yaw))
            outlines.append(outline / (2 * outline.mean()))
            kinds.append(kind)
    return np.array(kinds), array(outlines)


def find_shape(outlines: Outlines) -> Match:
    """The shape whose outlines, moved and scaled, are nearest over all frames; large and whole ones count more."""
    kinds, templates = _templates()
    count = len(outlines.frames)
    errors = np.empty((count, len(SHAPES)), np.float32)
    complete = np.empty((len(SHAPES), count, len(_ANGLES)), np.float32)
    weights = np.empty(count, np.float32)
    for index, (support, known) in enumerate(zip(outlines.supports, outlines.known, strict=True)):
        # Least squares over the known directions: a move changes a support function by a sum of cosine and sine.
        moves, _ = np.linalg.qr(_RAYS[:, known].T)
        seen = support[known] - moves @ (moves.T @ support[known])
        wanted = templates[:, known] - (templates[:, known] @ moves) @ moves.T
        scales = np.maximum(wanted @ seen, 1e-6) / np.maximum(np.square(wanted).sum(-1), 1e-6)
        misfit = np.abs(wanted * scales[:, None] - seen).mean(-1) / scales
        for kind in range(len(SHAPES)):
            members = np.flatnonzero(kinds == kind)
            best = members[misfit[members].argmin()]
            errors[index, kind] = misfit[best]
            fit = templates[best] * scales[best]
            shift, *_ = np.linalg.lstsq(_RAYS[:, known].T, (support - fit)[known], rcond=None)
            complete[kind, index] = np.where(known, support, fit + shift @ _RAYS)
        weights[index] = support.mean() * known.mean() ** 4
    mean = np.average(np.minimum(errors, 0.2), axis=0, weights=np.maximum(weights, 1e-6))
    kind = int(mean.argmin())
    return Match(SHAPES[kind], float(mean[kind]), Outlines(outlines.frames, complete[kind], outlines.known))


@cache
def ground_table(shape: Shape, size: Size) -> FloatArray:
    """For an object on the floor, `[places, 4]` from far to near: z, height, bottom edge, frame heights a unit."""
    radius, rows = RADIUS[size], []
    for z in np.linspace(-11, 3.7, 90):
        support = _project(shape, radius, (0.0, radius, float(z)), np.pi / 8)
        axis = Camera.still(1).project(array([[[0, radius, z]], [[1, radius, z]]]), 1, 1)[:, 0, 0]
        rows.append((z, support[DOWN] + support[UP], support[DOWN], axis[1] - axis[0]))
    return array(rows)

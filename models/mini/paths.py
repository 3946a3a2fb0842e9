"""Paths: where an object is in the world, frame by frame, and what that says of its size, motion and place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.mini.camera import FOV, POSITION, Camera
from models.mini.outlines import DOWN, LEFT, RIGHT, SIZES, UP, Match, ground_table
from models.mini.rays import FloatArray, array
from models.mini.scene import FPS
from models.mini.world import RADIUS, Motion, Relation, Size

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Path:
    """World places of an object's foot in some frames; lengths in units, times in seconds."""

    times: FloatArray  # [seen]
    x: FloatArray  # [seen]
    z: FloatArray  # [seen]: from how large it looks
    standing_z: FloatArray  # [seen]: from where its foot is seen, if it is on the floor
    lift: FloatArray  # [seen]: height over the floor
    radius: float

    def between(self, start: float, end: float) -> Path:
        """The part of it from `start` to `end` seconds."""
        part = (self.times >= start) & (self.times <= end)
        return Path(self.times[part], self.x[part], self.z[part], self.standing_z[part], self.lift[part], self.radius)


def find_size(match: Match) -> Size:
    """Small or large, from the height of the outline where its foot is lowest, so on the floor."""
    misfits = [abs(float(np.log(_relative_height(match, size)))) for size in SIZES]
    return SIZES[int(np.argmin(misfits))]


def _relative_height(match: Match, size: Size) -> float:
    """The outline's height against what it would be for an object of `size` standing where its foot is lowest."""
    outlines = match.outlines
    use = outlines.reliable
    heights = (outlines.supports[:, DOWN] + outlines.supports[:, UP])[use]
    bottoms = outlines.supports[use, DOWN]
    low = bottoms >= np.sort(bottoms)[-min(3, len(bottoms))]
    _, height, bottom, _ = ground_table(match.shape, size).T
    return float(np.median(heights[low] / np.interp(bottoms[low], bottom, height)))


def find_path(match: Match, size: Size, camera: Camera) -> Path:
    """The way of an object whose shape and size are known, in the frames that show enough of it."""
    outlines = match.outlines
    use = outlines.reliable
    frames, supports = outlines.frames[use], outlines.supports[use]
    z, height, bottom, scale = ground_table(match.shape, size).T
    heights = supports[:, DOWN] + supports[:, UP]
    unit = np.interp(heights, height, scale)
    across = (supports[:, RIGHT] - supports[:, LEFT]) / 2 / unit
    lift = (np.interp(heights, height, bottom) - supports[:, DOWN]) / unit
    nearer = np.interp(heights, height, z), np.interp(supports[:, DOWN], bottom, z)
    right, _, forward = camera.basis()
    flat = forward[frames][:, [0, 2]]
    flat = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    middle = camera.positions[frames][:, [0, 2]] + right[frames][:, [0, 2]] * across[:, None]
    (x, by_size), (_, by_foot) = (array(middle + flat * (POSITION[2] - ahead)[:, None]).T for ahead in nearer)
    radius = RADIUS[size] * _relative_height(match, size)
    return Path(array(frames / FPS), x, by_size, by_foot, array(lift), radius)


def find_motion(path: Path, pace: float) -> tuple[Motion | None, float]:
    """The motion whose least speed is exceeded most, if any is, and by how much; `pace` scales the speeds."""
    sideways = _slope(path.times, path.x)
    nearer = _slope(path.times, path.z)
    bounce = float(np.percentile(path.lift, 92) - np.percentile(path.lift, 8)) if len(path.lift) else 0.0
    scores: dict[Motion, float] = {
        "right": sideways / pace,
        "left": -sideways / pace,
        "closer": nearer / (1.7 * pace),
        "away": -nearer / (1.7 * pace),
        "bouncing": bounce / 0.8,
    }
    best = max(scores, key=lambda motion: scores[motion])
    return (best if scores[best] > 0.5 else None), scores[best]


def _slope(times: FloatArray, values: FloatArray) -> float:
    """Theil-Sen slope: the median over all pairs, deaf to a few outliers."""
    first, second = np.triu_indices(len(times), max(1, len(times) // 4))
    if not len(first):
        return 0.0
    return float(np.median((values[second] - values[first]) / (times[second] - times[first])))


def find_relation(first: Path, second: Path) -> Relation:
    """Where the first object is as seen from the second when the clip starts, as the camera's middle pose sees it."""
    (x, z), (other_x, other_z) = _start(first), _start(second)
    dx, dz = x - other_x, z - other_z
    if abs(dz) < 0.7 * abs(dx):  # objects beside each other stand in one row, those behind each other somewhat aside
        return "right of" if dx > 0 else "left of"
    return "in front of" if dz > 0 else "behind"


def _start(path: Path) -> tuple[float, float]:
    """Where an object is at first; one that bounces stays there, and its place is told where its foot is lowest."""
    if np.percentile(path.lift, 92) - np.percentile(path.lift, 8) > 0.4:
        landed = path.lift.min() < 0.2  # else something hides its foot whenever it is down
        z = np.sort(path.standing_z)[-2:].mean() if landed else np.median(path.z)
        return float(np.median(path.x)), float(z)
    part = slice(max(3, len(path.x) // 3))
    # A foot may be lost in the floor's colour, an outline's height behind another object: neither is trusted alone.
    return float(np.median(path.x[part])), float(np.median((path.z + path.standing_z)[part]) / 2)


def turning(pixels: FloatArray, mask: BoolArray, match: Match, camera: Camera, part: slice) -> float:
    """How much a cube's shading changes in a quarter of a second: below 0.7 at rest, 1.5 and more when it turns.

    Each frame's outline box is sampled on one grid, so that neither the object's way nor the camera's matters; only
    frames in `part` are looked at.
    """
    if match.shape != "cube":
        return 0.0
    height, width = mask.shape[1:]
    zoom = np.tan(np.radians(camera.fov_degrees) / 2) / np.tan(np.radians(FOV) / 2)
    grid = (np.arange(16) + 0.5) / 16
    seen: dict[int, tuple[FloatArray, BoolArray]] = {}
    for index, support in zip(match.outlines.frames.tolist(), match.outlines.supports, strict=True):
        if not part.start <= index < part.stop:
            continue
        reach = support * height / zoom[index]
        rows = height / 2 - reach[UP] + grid * (reach[DOWN] + reach[UP])
        columns = width / 2 - reach[LEFT] + grid * (reach[RIGHT] + reach[LEFT])
        box = np.ix_(np.clip(rows, 0, height - 1).astype(int), np.clip(columns, 0, width - 1).astype(int))
        seen[index] = pixels[index][box].mean(-1), mask[index][box]
    apart = FPS // 4  # an orbit turns everything too, a fifth as fast: longer and both look alike
    changes = []
    for index, (before, inside) in seen.items():
        if index + apart in seen:
            after, still_inside = seen[index + apart]
            both = inside & still_inside
            if both.mean() > 0.2:
                changes.append(np.abs(after - before)[both].mean() / before[both].mean())
    return float(np.median(changes) / 0.1) if changes else 0.0

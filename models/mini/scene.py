"""Scenes: attributes placed in space and time, within the ranges that an attribute leaves free.

Axes: x right, y up, z towards the viewer; the floor is y = 0; one unit is about the height of a large object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.mini.camera import ORBIT_DEGREES, PAN_DEGREES, ZOOM, Camera
from models.mini.rays import FloatArray, Shape, array
from models.mini.world import FLOOR_RGB, OBJECT_RGB, RADIUS, SUNS, Attributes, Color, Motion, Relation, Sun

FPS = 16
FRAMES = 33
HEIGHT = WIDTH = 128
# Beyond these nothing is seen any more, or all of the picture is one object: paths turn round or end there.
_WIDEST, _NEAREST, _FARTHEST = 3.4, 2.2, -9.0


@dataclass(frozen=True, slots=True)
class Body:
    """One object: its kind, colour, radius, and per-frame centre `[frames, 3]` and yaw `[frames]` (radians)."""

    shape: Shape
    rgb: tuple[float, float, float]
    radius: float
    centers: FloatArray
    yaws: FloatArray


@dataclass(frozen=True, slots=True)
class Scene:
    """All that the renderer needs; `attributes` is what is true of it.

    `change_at`: seconds from the start to a two-beat clip's second beat.
    """

    attributes: Attributes
    bodies: tuple[Body, ...]
    camera: Camera
    floor_rgb: tuple[float, float, float]
    sun: Sun
    frames: int = FRAMES
    change_at: float | None = None


def make_scene(attributes: Attributes, rng: np.random.Generator, frames: int = FRAMES) -> Scene:
    """Place the objects and the camera; choose speeds and shades within the attributes' ranges."""
    time = array(np.arange(frames) / FPS)
    radius = _radius(attributes.size, rng)
    change_at = float(rng.uniform(0.9, 1.1)) if attributes.then else None
    other = attributes.other
    bodies = []
    if other:
        other_radius = _radius(other.size, rng)
        start, place = _beside(other.relation, radius, other_radius, rng)
        center = np.tile(array([place[0], other_radius, place[1]]), (frames, 1))
        yaws = np.full(frames, _yaw(rng), np.float32)
        bodies.append(Body(other.shape, _shade(other.color, rng), other_radius, center, yaws))
        beats: list[tuple[Motion, float]] = [(attributes.motion, np.inf)]
        centers, yaws = _path(beats, start, time, 0.5, rng)
    else:
        beats = [(attributes.motion, np.inf)]
        if attributes.then and change_at:
            beats = [(attributes.motion, change_at), (attributes.then, np.inf)]
        centers, yaws = _path(beats, None, time, 1.0, rng)
    centers[:, 1] += radius
    bodies.insert(0, Body(attributes.shape, _shade(attributes.color, rng), radius, centers, yaws))
    floor = np.array(FLOOR_RGB[attributes.floor]) * rng.uniform(0.95, 1.05)
    extents = {"pan": PAN_DEGREES, "orbit": ORBIT_DEGREES, "zoom": ZOOM, "still": (0.0, 0.0)}
    extent = float(rng.uniform(*extents[attributes.camera.split()[0]]))
    camera = Camera.moving(attributes.camera, extent, time)
    return Scene(attributes, tuple(bodies), camera, _rgb(floor), SUNS[attributes.light], frames, change_at)


def _radius(size: str, rng: np.random.Generator) -> float:
    return float(RADIUS["small" if size == "small" else "large"] * rng.uniform(0.94, 1.06))


def _yaw(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.15, np.pi / 2 - 0.15))


def _shade(color: Color, rng: np.random.Generator) -> tuple[float, float, float]:
    rgb = np.array(OBJECT_RGB[color]) * rng.uniform(0.94, 1.0) + rng.uniform(-0.015, 0.015, 3)
    return _rgb(np.clip(rgb, 0, 1))


def _rgb(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def _beside(
    relation: Relation, radius: float, other: float, rng: np.random.Generator
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the first and the other object start, `(x, z)` each: apart, and neither wholly hidden."""
    reach = radius + other
    if relation in ("left of", "right of"):
        dx, dz = 1.15 * reach + rng.uniform(0.1, 0.4), rng.uniform(-0.2, 0.2)
        dx *= -1 if relation == "left of" else 1
    else:
        dx = rng.uniform(0.8, 1.05) * reach * rng.choice([-1.0, 1.0])
        dz = (1.15 * reach + rng.uniform(0.2, 0.5)) * (1 if relation == "in front of" else -1)
    x, z = rng.uniform(-0.2, 0.2), rng.uniform(-0.5, 0.1)
    return (x + dx / 2, z + dz / 2), (x - dx / 2, z - dz / 2)


def _path(
    beats: list[tuple[Motion, float]],
    start: tuple[float, float] | None,
    time: FloatArray,
    pace: float,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray]:
    """Centres above the floor `[frames, 3]` and yaws `[frames]` of motions, each until a moment (seconds).

    Without `start` (x, z) the path of the first two seconds lies around the middle of the picture. `pace` scales the
    speeds (units a second).
    """
    across, along, height = (np.zeros(len(time)) for _ in range(3))
    yaws = np.full(len(time), _yaw(rng))
    begin, total = 0.0, np.zeros(2)
    lowest, highest = np.zeros(2), np.zeros(2)  # of x and z, in two seconds
    for motion, end in beats:
        here = np.clip(time - begin, 0, end - begin)
        velocity = np.zeros(2)
        match motion:
            case "left" | "right":
                velocity[0] = pace * rng.uniform(1.0, 1.3) * (1 if motion == "right" else -1)
            case "closer" | "away":
                velocity[1] = pace * rng.uniform(1.7, 2.0) * (1 if motion == "closer" else -1)
            case "bouncing":
                height += _bounces(here, begin, end, rng) * ((time >= begin) & (time < end))
            case "spinning":
                yaws += rng.uniform(1.8, 2.4) * rng.choice([-1.0, 1.0]) * here
            case "still":
                pass
        across += velocity[0] * here
        along += velocity[1] * here
        total += velocity * (min(end, 2.0) - begin)
        lowest, highest = np.minimum(lowest, total), np.maximum(highest, total)
        begin = end
    if start is None:
        middle, extent = (lowest + highest) / 2, highest - lowest
        free = np.where(extent > 0, 0.25, 1.0)
        start = (
            float(free[0] * rng.uniform(-0.7, 0.7) - middle[0]),
            float(free[1] * rng.uniform(-0.9, 0.5) - middle[1] - (0.5 if extent[1] else 0.0)),
        )
    x = np.mod(across + start[0] + _WIDEST, 2 * _WIDEST) - _WIDEST
    z = np.clip(along + start[1], _FARTHEST, _NEAREST)
    return np.stack([x, height, z], -1).astype(np.float32), yaws.astype(np.float32)


def _bounces(time: NDArray[np.float64], begin: float, end: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Height over the floor; a first beat ends with a landing, a second begins with a jump."""
    period, peak = rng.uniform(0.85, 1.05), rng.uniform(0.9, 1.15)
    offset = rng.uniform(0.0, 1.0)
    if begin > 0 or np.isfinite(end):
        offset = 0.0
    if np.isfinite(end):
        period = (end - begin) / max(1, round((end - begin) / period))
    phase = np.mod(time / period + offset, 1.0)
    return np.asarray(peak * 4 * phase * (1 - phase))

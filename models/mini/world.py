"""The clip world: short ray-traced clips whose every attribute is known.

One object moves over a plain floor under one of three lights. Rays are intersected analytically (sphere, box,
cylinder, cone, plane), shaded with Lambert's law and a soft shadow, and anti-aliased by 2x2 samples where the object or
its shadow can be. A clip is a pure function of its `Scene`, so a seed is enough to render it again.

Axes: x right, y up, z towards the viewer; the floor is y = 0; one unit is about the height of a large object.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models.mini.rays import FAR, REACH, FloatArray, Shape, array, dot, intersect, turn, unit

IntArray = NDArray[np.int64]

Color = Literal["red", "green", "blue", "yellow", "purple", "orange", "white", "cyan"]
Size = Literal["small", "large"]
Motion = Literal["left", "right", "closer", "away", "bouncing", "spinning", "still"]
Floor = Literal["grey", "green", "sand", "navy"]
Light = Literal["noon", "sunset", "night"]

FPS = 16
FRAMES = 33
HEIGHT = WIDTH = 128
HELD_OUT_SHARE = 0.1

OBJECT_RGB: dict[Color, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.95, 0.88, 0.10),
    "purple": (0.60, 0.12, 0.80),
    "orange": (1.00, 0.50, 0.05),
    "white": (0.95, 0.95, 0.95),
    "cyan": (0.10, 0.85, 0.90),
}
FLOOR_RGB: dict[Floor, tuple[float, float, float]] = {
    "grey": (0.50, 0.50, 0.50),
    "green": (0.28, 0.48, 0.22),
    "sand": (0.80, 0.70, 0.48),
    "navy": (0.16, 0.20, 0.42),
}
RADIUS: dict[Size, float] = {"small": 0.42, "large": 0.80}


@dataclass(frozen=True, slots=True)
class Sun:
    """A directional light of finite angular size, an ambient term and the sky it belongs to."""

    direction: tuple[float, float, float]
    color: tuple[float, float, float]
    ambient: tuple[float, float, float]
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]


SUNS: dict[Light, Sun] = {
    "noon": Sun((0.35, 1.0, 0.9), (0.62, 0.62, 0.60), (0.42, 0.42, 0.44), (0.40, 0.62, 0.92), (0.78, 0.88, 0.97)),
    "sunset": Sun((-0.75, 0.75, 0.7), (0.72, 0.50, 0.30), (0.36, 0.27, 0.25), (0.55, 0.32, 0.45), (0.98, 0.60, 0.32)),
    "night": Sun((0.45, 0.9, 0.75), (0.33, 0.36, 0.46), (0.17, 0.18, 0.25), (0.02, 0.03, 0.09), (0.07, 0.09, 0.20)),
}


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a caption says of a clip and what the judge reads back from its pixels."""

    shape: Shape
    color: Color
    size: Size
    motion: Motion
    floor: Floor
    light: Light

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept from training; decided by a hash, so that it never changes."""
        text = "/".join((self.shape, self.color, self.size, self.motion, self.floor, self.light))
        return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def all_attributes() -> list[Attributes]:
    """Every combination of the world; only a cube can be seen to spin."""
    values = product(*(get_args(kind) for kind in (Shape, Color, Size, Motion, Floor, Light)))
    return [a for a in (Attributes(*v) for v in values) if a.motion != "spinning" or a.shape == "cube"]


@dataclass(frozen=True, slots=True)
class Body:
    """One object: its kind, colour, radius, and per-frame centre `[frames, 3]` and yaw `[frames]` (radians)."""

    shape: Shape
    rgb: tuple[float, float, float]
    radius: float
    centers: FloatArray
    yaws: FloatArray


@dataclass(frozen=True, slots=True)
class Camera:
    """A pinhole camera: per-frame position and target `[frames, 3]`, vertical field of view in degrees."""

    positions: FloatArray
    targets: FloatArray
    fov_degrees: float = 40.0

    @classmethod
    def still(cls, frames: int) -> Camera:
        return cls(
            np.tile(array([0.0, 1.7, 6.0]), (frames, 1)),
            np.tile(array([0.0, 0.6, 0.0]), (frames, 1)),
        )

    def basis(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Right, up and forward unit vectors, `[frames, 3]` each."""
        forward = unit(self.targets - self.positions)
        right = unit(np.cross(forward, array([0.0, 1.0, 0.0])).astype(np.float32))
        return right, np.cross(right, forward).astype(np.float32), forward

    @property
    def moves(self) -> bool:
        return bool(np.ptp(self.positions, 0).any() or np.ptp(self.targets, 0).any())

    def directions(self, frame: IntArray, y: NDArray[Any], x: NDArray[Any], height: int, width: int) -> FloatArray:
        """Unit directions `[rays, 3]` through image points (pixels; the centre of the first is 0.5, 0.5)."""
        right, up, forward = self.basis()
        reach = np.float32(np.tan(np.radians(self.fov_degrees) / 2) / (height / 2))
        across = ((x - width / 2) * reach).astype(np.float32)[:, None]
        down = ((y - height / 2) * reach).astype(np.float32)[:, None]
        return unit(forward[frame] + right[frame] * across - up[frame] * down)

    def project(self, points: FloatArray, height: int, width: int) -> FloatArray:
        """Image points `[..., frames, 2]` (x, y in pixels) of world points `[..., frames, 3]`."""
        right, up, forward = self.basis()
        offset = points - self.positions
        depth = np.maximum(dot(offset, forward), 0.1)
        scale = height / (2 * np.tan(np.radians(self.fov_degrees) / 2))
        x = width / 2 + scale * dot(offset, right) / depth
        y = height / 2 - scale * dot(offset, up) / depth
        return np.stack([x, y], -1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Scene:
    """All that the renderer needs; `attributes` is what is true of it."""

    attributes: Attributes
    bodies: tuple[Body, ...]
    camera: Camera
    floor_rgb: tuple[float, float, float]
    sun: Sun
    frames: int = field(default=FRAMES)


def make_scene(attributes: Attributes, rng: np.random.Generator, frames: int = FRAMES) -> Scene:
    """Place the object, choose its speed and shade within the attribute's range."""
    time = array(np.arange(frames) / FPS)
    radius = RADIUS[attributes.size] * rng.uniform(0.94, 1.06)
    centers, yaws = _path(attributes, time, radius, rng)
    rgb = np.clip(np.array(OBJECT_RGB[attributes.color]) * rng.uniform(0.94, 1.0) + rng.uniform(-0.015, 0.015, 3), 0, 1)
    floor = np.array(FLOOR_RGB[attributes.floor]) * rng.uniform(0.95, 1.05)
    body = Body(attributes.shape, _rgb(rgb), float(radius), centers, yaws)
    return Scene(attributes, (body,), Camera.still(frames), _rgb(floor), SUNS[attributes.light], frames)


def _path(
    attributes: Attributes, time: FloatArray, radius: float, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Centres `[frames, 3]` and yaws `[frames]` of the attribute's motion; speeds are units a second."""
    centers = np.zeros((len(time), 3), np.float32)
    centers[:, 1] = radius
    yaw = rng.uniform(0.15, np.pi / 2 - 0.15)
    yaws = np.full(len(time), yaw, np.float32)
    x, z = rng.uniform(-0.7, 0.7), rng.uniform(-0.9, 0.5)
    match attributes.motion:
        case "left" | "right":
            sign = 1.0 if attributes.motion == "right" else -1.0
            centers[:, 0] = sign * (rng.uniform(-1.3, -0.9) + rng.uniform(1.0, 1.3) * time)
            centers[:, 2] = z
        case "closer" | "away":
            sign = 1.0 if attributes.motion == "closer" else -1.0
            centers[:, 0] = 0.6 * x
            centers[:, 2] = -0.7 + sign * (rng.uniform(-2.0, -1.7) + rng.uniform(1.7, 2.0) * time)
        case "bouncing":
            period, peak = rng.uniform(0.85, 1.05), rng.uniform(0.9, 1.15)
            phase = np.mod(time / period + rng.uniform(0.0, 1.0), 1.0)
            centers[:, 0], centers[:, 2] = x, z - 0.3
            centers[:, 1] += peak * 4 * phase * (1 - phase)
        case "spinning":
            centers[:, 0], centers[:, 2] = x, z
            yaws += np.float32(rng.uniform(1.8, 2.4) * rng.choice([-1.0, 1.0])) * time
        case "still":
            centers[:, 0], centers[:, 2] = x, z
    return centers, yaws


# Rendering ------------------------------------------------------------------------------------------------------------


def render(scene: Scene, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """The clip as `[frames, height, width, 3]` uint8 RGB."""
    frames = background(scene, height, width)
    frame, y, x = np.nonzero(_busy_pixels(scene, height, width))
    samples = [
        _shade(scene, frame, scene.camera.directions(frame, y + dy, x + dx, height, width))
        for dy, dx in product((0.25, 0.75), repeat=2)
    ]
    frames[frame, y, x] = np.mean(samples, 0, dtype=np.float32)
    return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def background(scene: Scene, height: int, width: int) -> FloatArray:
    """Floor and sky, one sample a pixel: both are smooth, and a haze hides the horizon's edge."""
    frames = scene.frames if scene.camera.moves else 1
    frame, y, x = (axis.ravel() for axis in np.indices((frames, height, width)))
    directions = scene.camera.directions(frame, y + 0.5, x + 0.5, height, width)
    color = _floor_and_sky(scene, frame, directions, ()).reshape(frames, height, width, 3)
    return color if scene.camera.moves else np.repeat(color, scene.frames, 0)


def _busy_pixels(scene: Scene, height: int, width: int) -> NDArray[np.bool_]:
    """`[frames, height, width]`: pixels that can see an object or its shadow, a pixel of margin included."""
    frames = scene.frames if scene.camera.moves else 1
    frame, y, x = (axis.ravel() for axis in np.indices((frames, height, width)))
    directions = scene.camera.directions(frame, y + 0.5, x + 0.5, height, width).reshape(frames, -1, 3)
    origin = scene.camera.positions[:frames, None]
    points = origin + directions * _floor_distance(origin, directions)[..., None]
    sun = unit(array(scene.sun.direction))
    busy = np.zeros((scene.frames, height * width), np.bool_)
    for body in scene.bodies:
        reach = REACH[body.shape] * body.radius
        offset = body.centers[:, None] - origin
        along = dot(directions, offset)
        margin = 0.02 * along
        busy |= (dot(offset, offset) - np.square(along) < np.square(reach + margin)) & (along > 0)
        busy |= (directions[..., 1] < 0) & _near_axis(body.centers[:, None] - points, sun, reach + 0.05)
    return busy.reshape(scene.frames, height, width)


def _shade(scene: Scene, frame: IntArray, directions: FloatArray) -> FloatArray:
    """Colours `[rays, 3]` of rays that start at the camera in their `frame` `[rays]`."""
    origin = scene.camera.positions[frame]
    color = _floor_and_sky(scene, frame, directions, scene.bodies)
    nearest = np.full(len(frame), FAR, np.float32)
    sun = scene.sun
    toward_sun = unit(array(sun.direction))
    for body in scene.bodies:
        near = np.flatnonzero(_near_axis(body.centers[frame] - origin, directions, REACH[body.shape] * body.radius))
        distance, normal = _intersect(body, frame[near], origin[near], directions[near])
        hit = distance < nearest[near]
        rays, normal = near[hit], normal[hit]
        nearest[rays] = distance[hit]
        diffuse = np.maximum(normal @ toward_sun, 0)[:, None] * array(sun.color) * 1.15
        # A little light comes back from the floor: the shaded side keeps its form.
        bounce = 0.75 + 0.25 * normal[:, 1:2]
        color[rays] = array(body.rgb) * (diffuse + array(sun.ambient) * bounce)
    return color


def _floor_and_sky(scene: Scene, frame: IntArray, directions: FloatArray, casters: tuple[Body, ...]) -> FloatArray:
    """Colours of rays that meet no object; `casters` throw a soft shadow on the floor."""
    sun = scene.sun
    origin = scene.camera.positions[frame]
    on_floor = directions[:, 1] < -1e-3
    distance = _floor_distance(origin, directions)
    points = origin + directions * distance[:, None]
    light = _sunlight(casters, sun, frame, points, on_floor)[:, None]
    lit = array(sun.color) * unit(array(sun.direction))[1] * light
    floor = array(scene.floor_rgb) * (lit + array(sun.ambient))
    height = np.clip(directions[:, 1:2] / np.float32(0.30), 0, 1)
    sky = array(sun.horizon) * (1 - height) + array(sun.zenith) * height
    clear = np.where(on_floor, np.exp(-np.square(distance / np.float32(28))), np.float32(0))[:, None]
    return np.asarray(floor * clear + sky * (1 - clear), np.float32)


def _floor_distance(origin: FloatArray, directions: FloatArray) -> FloatArray:
    """Ray-plane: the distance along each ray to y = 0, huge above the horizon."""
    return np.asarray(-origin[..., 1] / np.minimum(directions[..., 1], np.float32(-1e-3)), np.float32)


def _sunlight(
    casters: tuple[Body, ...], sun: Sun, frame: IntArray, points: FloatArray, wanted: NDArray[np.bool_]
) -> FloatArray:
    """The share `[rays]` of the sun's disc that each floor point sees, from five rays to the disc."""
    light = np.ones(len(points), np.float32)
    center = unit(array(sun.direction))
    side = unit(np.cross(center, array([0, 0, 1])).astype(np.float32))
    other = np.cross(center, side).astype(np.float32)
    spread = 0.07 * array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    for body in casters:
        reach = REACH[body.shape] * body.radius
        near = np.flatnonzero(wanted & _near_axis(body.centers[frame] - points, center, reach))
        for u, v in spread:
            direction = np.broadcast_to(unit(center + u * side + v * other), (len(near), 3))
            distance, _ = _intersect(body, frame[near], points[near], direction)
            light[near] -= (distance < FAR) / np.float32(len(spread))
    return np.maximum(light, 0)


def _near_axis(offset: FloatArray, direction: FloatArray, reach: float) -> NDArray[np.bool_]:
    """Whether the ray along `direction` passes within `reach` (and the sun's penumbra) of a centre at `offset`."""
    along = dot(offset, direction)
    return np.asarray(dot(offset, offset) - np.square(along) < np.square(reach + 0.1 * np.maximum(along, 0) * reach))


def _intersect(body: Body, frame: IntArray, origin: FloatArray, direction: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Distance `[rays]` (`FAR` on a miss) and outward normal `[rays, 3]` in world axes."""
    local_origin = turn(origin - body.centers[frame], -body.yaws[frame]) / np.float32(body.radius)
    distance, normal = intersect(body.shape, local_origin, turn(direction, -body.yaws[frame]))
    distance = np.where(distance < FAR, distance * np.float32(body.radius), FAR)
    return distance.astype(np.float32), turn(normal, body.yaws[frame])


def _rgb(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])

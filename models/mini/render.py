"""Renders a scene: analytic ray tracing in numpy.

Rays are intersected with spheres, boxes, cylinders, cones and the floor, shaded with Lambert's law and a soft shadow,
and anti-aliased by 2x2 samples where an object or its shadow can be. The floor has soft tiles: they show how the camera
moves.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from models.mini.rays import FAR, REACH, FloatArray, array, dot, intersect, turn, unit
from models.mini.scene import HEIGHT, WIDTH, Body, Scene
from models.mini.world import Sun

IntArray = NDArray[np.int64]

TILE = 1.5  # units a tile
TILE_CONTRAST = 0.16


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
    floor = array(scene.floor_rgb) * (lit + array(sun.ambient)) * _tiles(points, distance)
    height = np.clip(directions[:, 1:2] / np.float32(0.30), 0, 1)
    sky = array(sun.horizon) * (1 - height) + array(sun.zenith) * height
    clear = np.where(on_floor, np.exp(-np.square(distance / np.float32(28))), np.float32(0))[:, None]
    return np.asarray(floor * clear + sky * (1 - clear), np.float32)


def _tiles(points: FloatArray, distance: FloatArray) -> FloatArray:
    """Brightness `[rays, 1]` of a soft-edged checkerboard that fades with distance."""
    waves = np.sin(np.pi / TILE * points[:, 0]) * np.sin(np.pi / TILE * points[:, 2])
    fade = np.exp(-np.square(distance / np.float32(12)))
    return np.asarray(1 + np.float32(TILE_CONTRAST) * (np.tanh(4 * waves) * fade)[:, None], np.float32)


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

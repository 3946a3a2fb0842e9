"""Empty scenes: which floor, which light and which camera a clip was made with.

An empty scene is linear in the colours of its floor and sky, so each camera is rendered once, as three layers. Floor
and light are those whose empty scene explains the clip best; the camera is the one whose tiles lie where the clip's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from models.mini import render
from models.mini.camera import Camera
from models.mini.rays import FloatArray, array, dot, unit
from models.mini.scene import FPS, Scene
from models.mini.world import FLOOR_RGB, SUNS, Attributes, CameraMove, Floor, Light, Sun

BoolArray = NDArray[np.bool_]
FrameIndices = tuple[int, ...]

# Wider than what scenes have: a generated camera may be a little slower or faster.
_EXTENTS: dict[CameraMove, tuple[float, ...]] = {
    "still": (0.0,),
    "pan left": (5.5, 7.0, 8.5, 10.0),
    "pan right": (5.5, 7.0, 8.5, 10.0),
    "orbit": (14.0, 17.0, 20.0, 23.0, 26.0),
    "zoom in": (0.15, 0.19, 0.23, 0.27),
    "zoom out": (0.15, 0.19, 0.23, 0.27),
}
_FINER = {"pan left": 0.5, "pan right": 0.5, "orbit": 1.0, "zoom in": 0.02, "zoom out": 0.02}
_SEARCH_HEIGHT, _SEARCH_FRAMES = 64, 9
_PHASES = 60  # an orbit's poses in half a turn; the tiles are the same again after it
_BRIGHTEST = 1.35  # a lit tile's light, against the floor's mean
_LEAST_LIKENESS = 0.08  # a camera that no tiles speak for is taken for still


@dataclass(frozen=True, slots=True)
class Course:
    """One camera's way, as `Camera.moving` wants it, and at which second of it the clip begins."""

    move: CameraMove
    extent: float = 0.0
    start: float = 0.0

    def camera(self, frames: FrameIndices) -> Camera:
        return Camera.moving(self.move, self.extent, array(self.start + np.array(frames) / FPS))


@dataclass(frozen=True, slots=True)
class Setting:
    """A floor under a light; `gain` is how bright its floor is against `FLOOR_RGB`."""

    floor: Floor
    light: Light
    gain: float = 1.0

    @property
    def sun(self) -> Sun:
        return SUNS[self.light]

    @property
    def dark_floor(self) -> FloatArray:
        return array(FLOOR_RGB[self.floor]) * np.float32(self.gain) * array(self.sun.ambient)

    @property
    def lit_floor(self) -> FloatArray:
        sunlight = array(self.sun.color) * unit(array(self.sun.direction))[1]
        return array(self.dark_floor + array(FLOOR_RGB[self.floor]) * np.float32(self.gain) * sunlight)

    def plates(self, layers: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The empty scene `[frames, height, width, 3]` (0..1) in full light and in full shadow."""
        floor, horizon, zenith = layers
        sky = np.stack([horizon, zenith], -1) @ array([self.sun.horizon, self.sun.zenith])
        floor = floor[..., None]
        return np.minimum(sky + floor * self.lit_floor, 1), np.minimum(sky + floor * self.dark_floor, 1)


@dataclass(frozen=True, slots=True)
class Backdrop:
    """What lies behind a clip's objects: setting and camera, and the empty scene in light and in shadow."""

    setting: Setting
    course: Course
    camera: Camera
    lit: FloatArray
    dark: FloatArray

    def strangeness(self, pixels: FloatArray) -> FloatArray:
        """Distance `[frames, height, width]` of each pixel from the nearest mix of light and shadow."""
        return distance_to_setting(pixels, self.lit, self.dark, 1.1)


def _layers(course: Course, frames: FrameIndices, height: int, width: int) -> FloatArray:
    """How much `[3, frames, height, width]` of each pixel is lit floor, sky at the horizon, sky at the zenith."""
    attributes = Attributes("ball", "red", "small", "still", "grey", "noon")
    sun = Sun((0, 1, 0), color=(1, 1, 1), ambient=(0, 0, 0), zenith=(0, 0, 1), horizon=(0, 1, 0))
    scene = Scene(attributes, (), course.camera(frames), (1, 0, 0), sun, len(frames))
    return np.ascontiguousarray(np.moveaxis(render.background(scene, height, width), -1, 0))


_fine_layers = lru_cache(maxsize=24)(_layers)
_coarse_layers = lru_cache(maxsize=400)(_layers)


def distance_to_setting(pixels: FloatArray, lit: FloatArray, dark: FloatArray, brightest: float) -> FloatArray:
    """Distance `[..., height, width]` from the nearest of `dark + share * (lit - dark)`, share <= brightest."""
    span = lit - dark
    offset = pixels - dark
    share = dot(offset, span) / np.maximum(dot(span, span), 1e-6)
    offset = offset - np.clip(share, 0, brightest)[..., None] * span
    return np.asarray(np.sqrt(dot(offset, offset)), np.float32)


def find_backdrop(pixels: FloatArray, start_seconds: float) -> tuple[Backdrop, FloatArray]:
    """What lies behind `pixels` `[frames, height, width, 3]`, and the pixels with drifted hues brought back to it."""
    frames, height, width = pixels.shape[:3]
    factor = max(1, round(height / _SEARCH_HEIGHT))
    indices = tuple(np.linspace(0, frames - 1, min(frames, _SEARCH_FRAMES)).round().astype(int).tolist())
    small = _shrink(pixels[list(indices)], factor)
    setting = _find_setting(small, indices, start_seconds)
    course = _find_course(small, indices, setting, start_seconds)
    every = tuple(range(frames))
    layers = _fine_layers(course, every, height, width)
    setting = Setting(setting.floor, setting.light, _find_gain(pixels, setting, layers))
    lit, dark = setting.plates(layers)
    backdrop = Backdrop(setting, course, course.camera(every), lit, dark)
    return backdrop, _without_drift(pixels, backdrop, layers[0] > 0.2)


def _shrink(pixels: FloatArray, factor: int) -> FloatArray:
    frames, height, width, channels = pixels.shape
    height, width = height // factor, width // factor
    whole = pixels[:, : height * factor, : width * factor]
    return array(whole.reshape(frames, height, factor, width, factor, channels).mean((2, 4), dtype=np.float32))


def _find_setting(small: FloatArray, indices: FrameIndices, start: float) -> Setting:
    """The tile-less empty scene that is nearest; from the frames around the middle pose, where all cameras agree."""
    times = start + np.array(indices) / FPS
    near = np.argsort(np.abs(times - 1), kind="stable")[:3] if start <= 1 else np.arange(len(indices))
    some = small[near]
    layers = _coarse_layers(Course("still"), (0,), *small.shape[1:3])
    smooth = np.stack([1 - layers[1] - layers[2], layers[1], layers[2]])
    settings = [Setting(floor, light) for floor, light in product(get_args(Floor), get_args(Light))]
    costs = [
        np.minimum(distance_to_setting(some, *setting.plates(smooth), _BRIGHTEST), 0.25).mean() for setting in settings
    ]
    return settings[int(np.argmin(costs))]


def _find_course(small: FloatArray, indices: FrameIndices, setting: Setting, start: float) -> Course:
    """The camera whose tiles are most like the clip's."""
    size = small.shape[1:3]
    tiles = _Tiles(small, setting)
    if start <= 1:
        coarse = [Course(move, extent, start) for move, extents in _EXTENTS.items() for extent in extents]
    else:
        coarse = [
            Course(move, extents[1 % len(extents)], start) for move, extents in _EXTENTS.items() if move != "orbit"
        ]
        coarse += _orbits_at_any_phase(tiles, indices, size)

    def likeness(course: Course) -> float:
        return tiles.likeness(_coarse_layers(course, indices, *size))

    best = max(coarse, key=likeness)
    if best.move == "still" or likeness(best) < _LEAST_LIKENESS:
        return Course("still", 0.0, start)
    for step in (_FINER[best.move], -_FINER[best.move]):
        while (finer := _farther(best, step, indices)) and likeness(finer) > likeness(best):
            best = finer
    return best


def _farther(course: Course, step: float, indices: FrameIndices) -> Course | None:
    """The same course with another extent; an orbit keeps its pose in the clip's middle."""
    extent = round(course.extent + step, 3)
    extents = _EXTENTS[course.move]
    if not extents[0] - 2 * abs(step) <= extent <= extents[-1] + 2 * abs(step):
        return None
    start = course.start
    if course.move == "orbit" and start > 1:
        middle = (indices[0] + indices[-1]) / 2 / FPS
        start = (start + middle - 1) * course.extent / extent + 1 - middle
    return Course(course.move, extent, start)


def _orbits_at_any_phase(tiles: _Tiles, indices: FrameIndices, size: tuple[int, int]) -> list[Course]:
    """Orbits that are near the best pose for the clip's middle frame, at several speeds."""
    step = 180 / _PHASES
    layers = _coarse_layers(Course("orbit", FPS * step, 1.0), tuple(range(_PHASES)), *size)
    middle = len(indices) // 2
    scores = [tiles.likeness(layers[:, phase : phase + 1], middle) for phase in range(_PHASES)]
    phases = [(int(np.argmax(scores)) + shift / 2) * step for shift in range(-2, 3)]
    at = indices[middle] / FPS
    return [Course("orbit", extent, phase / extent + 1 - at) for extent in _EXTENTS["orbit"] for phase in phases]


class _Tiles:
    """A clip's floor, for comparing its tiles with those that a camera would see; objects and shadows left out."""

    def __init__(self, small: FloatArray, setting: Setting) -> None:
        sun, ground = setting.sun, setting.lit_floor
        # All is measured in the lit floor's brightness: one number a pixel.
        axis = ground / dot(ground, ground)
        self._brightness = small @ axis
        self._horizon, self._zenith = float(array(sun.horizon) @ axis), float(array(sun.zenith) @ axis)
        layers = _coarse_layers(Course("still"), (0,), *small.shape[1:3])
        smooth = np.stack([1 - layers[1] - layers[2], layers[1], layers[2]])
        offset = small - setting.plates(smooth)[0]
        aside = dot(offset, offset) - np.square(offset @ axis) * dot(ground, ground)
        self._plain = aside < np.square(0.15) * dot(ground, ground)

    def likeness(self, layers: FloatArray, only: int | None = None) -> float:
        """Correlation of the clip's brightness with the tiles of `layers` `[3, frames, height, width]`."""
        frames = slice(None) if only is None else slice(only, only + 1)
        tiled, horizon, zenith = layers
        floor = 1 - horizon - zenith
        offset = self._brightness[frames] - (floor + horizon * self._horizon + zenith * self._zenith)
        weight = ((floor > 0.2) & (np.abs(offset) < 0.28 * floor) & self._plain[frames]).astype(np.float32)
        count = np.maximum(weight.sum((1, 2), keepdims=True), 1)
        values, tiles = offset * weight, (tiled - floor) * weight
        values -= weight * values.sum((1, 2), keepdims=True) / count
        tiles -= weight * tiles.sum((1, 2), keepdims=True) / count
        scale = float(np.sqrt(np.vdot(values, values) * np.vdot(tiles, tiles)))
        return float(np.vdot(values, tiles)) / scale if scale > 0 else 0.0


def _find_gain(pixels: FloatArray, setting: Setting, layers: FloatArray) -> float:
    """How bright the near floor is against the setting's."""
    lit, dark = setting.plates(layers[:, ::4, ::2, ::2])
    some = pixels[::4, ::2, ::2]
    near = slice(2 * some.shape[1] // 3, None)
    gains = dot(some[:, near], lit[:, near]) / np.maximum(dot(lit[:, near], lit[:, near]), 1e-6)
    like = distance_to_setting(some[:, near], lit[:, near], dark[:, near], _BRIGHTEST) < 0.08
    return round(float(np.clip(np.percentile(gains[like], 60), 0.9, 1.1)), 2) if like.any() else 1.0


def _without_drift(pixels: FloatArray, backdrop: Backdrop, floor: BoolArray) -> FloatArray:
    """The frames with their floor and sky brought to the backdrop's colours: a decoder's hues may drift in time."""
    coarse = (slice(None), slice(None, None, 2), slice(None, None, 2))
    offset = pixels[coarse] - backdrop.lit[coarse]
    like = distance_to_setting(pixels[coarse], backdrop.lit[coarse], backdrop.dark[coarse], 1.1) < 0.2
    drift = np.zeros((2, len(pixels), 1, 1, 3), np.float32)
    for index in range(len(pixels)):
        for kind, part in enumerate((~floor[coarse][index], floor[coarse][index])):
            wanted = like[index] & part
            if wanted.sum() > 0.4 * max(1, part.sum()):
                drift[kind, index] = np.clip(np.median(offset[index][wanted], axis=0), -0.15, 0.15)
    return np.asarray(pixels - np.where(floor[..., None], drift[1], drift[0]), np.float32)

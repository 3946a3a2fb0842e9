"""Reads a clip's attributes back from its pixels, with what is known of the world: its camera, floors, lights, colours.

Nothing is learned. The floor and the light are those whose empty scene explains the frames best; what no shade of that
floor explains is the object; its outline is compared with the outlines of the four shapes seen by the world's camera;
its path in world units gives the motion. Edges may be soft and colours somewhat off: choices are by nearest match.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.mini import rays, world
from models.mini.rays import FloatArray, Shape
from models.mini.world import Attributes, Camera, Color, Floor, Light, Motion, Size, Sun

BoolArray = NDArray[np.bool_]

_SHAPES: tuple[Shape, ...] = get_args(Shape)
_SIZES: tuple[Size, ...] = get_args(Size)
_COLORS: tuple[Color, ...] = get_args(Color)
_ANGLES = np.linspace(0, 2 * np.pi, 32, endpoint=False, dtype=np.float32)
_RAYS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])  # [2, angles]; 0 right, 8 down, 16 left, 24 up
_RIGHT, _DOWN, _LEFT, _UP = 0, 8, 16, 24

# Beyond these the nearest match is no match. Rendered clips stay near or below half of each.
_MAX_SETTING_ERROR = 0.13  # mean distance in RGB (0..1), at most 0.25 a pixel; the object is in it
_MAX_COLOR_ERROR = 0.14  # mean distance in RGB (0..1), at most 0.2 a pixel
_MAX_SHAPE_ERROR = 0.05  # mean distance between outlines of mean width 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge sees; `None` where it is nothing of the world's: no object, or another shape, colour or place."""

    shape: Shape | None
    color: Color | None
    size: Size | None
    motion: Motion | None
    floor: Floor | None
    light: Light | None

    def right(self, attributes: Attributes) -> dict[str, bool]:
        """For each attribute whether it is as `attributes` says."""
        seen = asdict(self)
        return {name: seen[name] == value for name, value in asdict(attributes).items()}


@dataclass(frozen=True, slots=True)
class _Setting:
    """An empty scene: its pixels `[height, width, 3]` in full light and in full shadow, both in 0..1."""

    floor: Floor
    light: Light
    lit: FloatArray
    dark: FloatArray


@dataclass(frozen=True, slots=True)
class _Track:
    """The object's outline in the frames where it is whole; lengths are in frame heights, y points down."""

    times: FloatArray  # [seen], seconds
    supports: FloatArray  # [seen, angles]: how far the outline reaches in each direction from the frame's centre
    clipped: BoolArray  # [seen]: touches the frame's edge


def judge(frames: NDArray[np.uint8]) -> Verdict:
    """Attributes of a clip `[frames, height, width, 3]`: RGB, `world.FPS` frames a second, the world's still camera."""
    pixels = _smooth(_f32(frames) / np.float32(255))
    setting = _find_setting(pixels)
    pixels = _without_drift(pixels, setting)
    strange = _distance_to_setting(pixels, setting)
    if np.minimum(strange, 0.25).mean() > _MAX_SETTING_ERROR:
        return Verdict(None, None, None, None, None, None)
    color, mask = _find_object(pixels, strange, world.SUNS[setting.light])
    track = _outline(mask)
    if track is None:
        return Verdict(None, color, None, None, setting.floor, setting.light)
    shape, error = _find_shape(track)
    size = _find_size(track, shape)
    motion = _find_motion(track, shape, size, pixels, mask)
    return Verdict(shape if error < _MAX_SHAPE_ERROR else None, color, size, motion, setting.floor, setting.light)


def _f32(values: ArrayLike) -> FloatArray:
    return np.asarray(values, np.float32)


def _smooth(pixels: FloatArray) -> FloatArray:
    """A light blur (1, 2, 1) in both directions against noise."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    across = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return np.asarray((across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]) / 16, np.float32)


# Floor and light ------------------------------------------------------------------------------------------------------


@cache
def _settings(height: int, width: int) -> tuple[_Setting, ...]:
    return tuple(
        _setting(floor, light, height, width, 1.0) for floor, light in product(get_args(Floor), get_args(Light))
    )


@cache
def _setting(floor: Floor, light: Light, height: int, width: int, gain: float) -> _Setting:
    red, green, blue = world.FLOOR_RGB[floor]
    attributes = Attributes("ball", "red", "small", "still", floor, light)
    sun = world.SUNS[light]
    empty = world.Scene(attributes, (), Camera.still(1), (red * gain, green * gain, blue * gain), sun, 1)
    lit = world.background(empty, height, width)[0]
    dark = world.background(replace(empty, sun=replace(sun, color=(0.0, 0.0, 0.0))), height, width)[0]
    return _Setting(floor, light, np.clip(lit, 0, 1), np.clip(dark, 0, 1))


def _find_setting(pixels: FloatArray) -> _Setting:
    """The empty scene nearest to five of the frames, its floor then as bright as the clip's."""
    some = pixels[np.linspace(0, len(pixels) - 1, 5).astype(int)]
    height, width = pixels.shape[1:3]
    costs = [np.minimum(_distance_to_setting(some, s), 0.25).mean() for s in _settings(height, width)]
    best = _settings(height, width)[int(np.argmin(costs))]
    near = slice(2 * height // 3, None)
    gains = (some[:, near] * best.lit[near]).sum(-1) / np.square(best.lit[near]).sum(-1)
    like = _distance_to_setting(some, best)[:, near] < 0.08
    gain = float(np.clip(np.percentile(gains[like], 60), 0.9, 1.1)) if like.any() else 1.0
    return _setting(best.floor, best.light, height, width, round(gain * 50) / 50)


def _without_drift(pixels: FloatArray, setting: _Setting) -> FloatArray:
    """The frames with each one's floor and sky brought to the setting's colours: a decoder's hues may drift in time."""
    horizon = int(np.argmax(np.abs(setting.lit - setting.dark).sum(-1).mean(-1) > 0.05))
    distance = _distance_to_setting(pixels, setting)
    steady = pixels.copy()
    for part in (slice(0, horizon), slice(horizon, None)):
        for index, frame in enumerate(pixels):
            offset = (frame - setting.lit)[part]
            like = distance[index, part] < 0.2
            if like.mean() > 0.4:
                steady[index, part] -= np.clip(np.median(offset[like], axis=0), -0.15, 0.15)
    return steady


def _distance_to_setting(pixels: FloatArray, setting: _Setting) -> FloatArray:
    """Distance `[frames, height, width]` of each pixel from the nearest mix of the setting's light and shadow."""
    span = setting.lit - setting.dark
    offset = pixels - setting.dark
    share = rays.dot(offset, span) / np.maximum(rays.dot(span, span), 1e-6)
    offset -= np.clip(share, 0, 1.05)[..., None] * span
    return np.asarray(np.sqrt(rays.dot(offset, offset)), np.float32)


# The object: colour and mask ------------------------------------------------------------------------------------------


@cache
def _palette(color: Color, sun: Sun) -> FloatArray:
    """Colours `[shades, 3]` that an object of this colour shows under this sun."""
    shades = [
        _f32(sun.color) * 1.15 * diffuse + _f32(sun.ambient) * bounce
        for diffuse, bounce in product(np.linspace(0, 1, 12), (0.55, 0.75, 0.95))
    ]
    return _f32(np.clip(_f32(world.OBJECT_RGB[color]) * 0.97 * _f32(shades), 0, 1))


def _distance_to_color(pixels: FloatArray, color: Color, sun: Sun) -> FloatArray:
    """Distance `[pixels]` of `pixels` `[pixels, 3]` from the nearest shade of a colour."""
    palette = _palette(color, sun)
    squares = np.square(pixels).sum(-1)[:, None] - 2 * pixels @ palette.T + np.square(palette).sum(-1)
    return _f32(np.sqrt(np.maximum(squares.min(-1), 0)))


def _find_object(pixels: FloatArray, strange: FloatArray, sun: Sun) -> tuple[Color | None, BoolArray]:
    """The object's colour (`None` if it has none of the world's) and its mask `[frames, height, width]`."""
    brightness = float(np.mean(sun.color) + np.mean(sun.ambient))
    threshold = 0.07 * brightness
    mask = strange > threshold
    sure = strange > 1.5 * threshold
    if sure.sum() < 12 * len(pixels):
        return None, np.zeros_like(mask)
    found, weight = pixels[sure], np.minimum(strange[sure], 0.4)
    step = max(1, len(found) // 4000)
    found, weight = found[::step], weight[::step]
    costs = [(weight * np.minimum(_distance_to_color(found, c, sun), 0.2)).sum() / weight.sum() for c in _COLORS]
    color = _COLORS[int(np.argmin(costs))]
    mask[mask] = strange[mask] > _distance_to_color(pixels[mask], color, sun)
    return color if min(costs) < _MAX_COLOR_ERROR else None, _without_specks(mask)


def _without_specks(mask: BoolArray) -> BoolArray:
    """Pixels of the mask that have three neighbours in it."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return np.asarray(mask & (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] >= 4))


def _outline(mask: BoolArray) -> _Track | None:
    """Outlines of each frame's largest connected patch; `None` when there is hardly ever one."""
    frames, height, width = mask.shape
    times, supports, clipped = [], [], []
    for index in range(frames):
        y, left, right = _largest_patch(mask[index])
        if (right - left).sum() < 1.5e-3 * height * height:
            continue
        x = np.concatenate([left, right, left, right])
        corners = np.stack([x, np.concatenate([y, y, y + 1, y + 1])], -1) - np.array([width / 2, height / 2])
        supports.append((corners @ _RAYS).max(0) / height)
        times.append(index / world.FPS)
        clipped.append(bool(left.min() == 0 or right.max() == width or y.min() == 0 or y.max() == height - 1))
    if len(times) < max(2, frames // 3):
        return None
    return _Track(_f32(times), _f32(supports), np.array(clipped))


def _largest_patch(mask: BoolArray) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row, left and right (exclusive) of the runs of the largest connected patch of `mask` `[height, width]`."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    y, left = np.nonzero(edges == 1)
    right = np.nonzero(edges == -1)[1]
    if len(y) > 4 * len(mask):  # snow, not an object
        return y[:0], left[:0], right[:0]
    parent = list(range(len(y)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    runs = list(zip(y.tolist(), left.tolist(), right.tolist(), strict=True))
    gap = 1 + len(mask) // 32  # a shaded part that looks like the floor behind it may cut an object in two
    first = 0
    for run, (row, start, end) in enumerate(runs):
        while runs[first][0] < row - gap:
            first += 1
        for other in range(first, run):
            if runs[other][0] < row and runs[other][1] < end and runs[other][2] > start:
                parent[root(other)] = root(run)
    label = np.array([root(run) for run in range(len(y))], np.int64)
    if not len(label):
        return y, left, right
    largest = label == np.bincount(label, right - left).argmax()
    return y[largest], left[largest], right[largest]


# Shape and size -------------------------------------------------------------------------------------------------------


@cache
def _surface(shape: Shape) -> FloatArray:
    """Points `[points, 3]` whose convex hull is the shape with radius 1 around the origin."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.zeros_like(turn), np.sin(turn)], -1)
    match shape:
        case "ball":
            slices = np.linspace(-1, 1, 25)[:, None, None]
            return _f32(circle * np.sqrt(1 - slices**2) + slices * [0, 1, 0]).reshape(-1, 3)
        case "cube":
            return _f32(list(product((-1, 1), repeat=3)))
        case "cylinder":
            return _f32(np.concatenate([0.85 * circle + [0, 1, 0], 0.85 * circle - [0, 1, 0]]))
        case "cone":
            return _f32(np.concatenate([circle - [0, 1, 0], [[0, 1, 0]]]))


def _project(shape: Shape, radius: float, center: tuple[float, float, float], yaw: float) -> FloatArray:
    """Support function `[angles]`, in frame heights, of an outline as the world's camera sees it."""
    points = _surface(shape)
    turned = rays.turn(points, np.full(len(points), yaw, np.float32)) * radius + _f32(center)
    seen = Camera.still(1).project(turned[:, None], 1, 1)[:, 0] - 0.5
    return np.asarray((seen @ _RAYS).max(0), np.float32)


def _normalised(supports: FloatArray) -> FloatArray:
    """Support functions moved to the middle of their bounding box and scaled to mean width 1."""
    x = (supports[:, _RIGHT] - supports[:, _LEFT]) / 2
    y = (supports[:, _DOWN] - supports[:, _UP]) / 2
    centered = supports - np.stack([x, y], -1) @ _RAYS
    return np.asarray(centered / (2 * centered.mean(-1, keepdims=True)), np.float32)


@cache
def _templates() -> tuple[NDArray[np.int64], FloatArray]:
    """Index into `_SHAPES` and normalised outline `[templates, angles]` over places, sizes and yaws."""
    kinds, outlines = [], []
    for kind, shape in enumerate(_SHAPES):
        yaws = np.linspace(0, np.pi / 2, 10, endpoint=False) if shape == "cube" else [0.0]
        for yaw, size, x, z, lift in product(yaws, _SIZES, (-1.3, -0.6, 0, 0.6, 1.3), (-2.2, -0.7, 0.8), (0, 0.9)):
            radius = world.RADIUS[size]
            outlines.append(_project(shape, radius, (x, radius + lift, z), float(yaw)))
            kinds.append(kind)
    return np.array(kinds), _normalised(_f32(outlines))


def _find_shape(track: _Track) -> tuple[Shape, float]:
    """The shape whose outlines are nearest over all frames, and how far they are.

    Large outlines count more, clipped ones little.
    """
    kinds, templates = _templates()
    outlines = _normalised(track.supports)
    distances = np.abs(outlines[:, None] - templates).mean(-1)
    nearest = np.stack([distances[:, kinds == kind].min(-1) for kind in range(len(_SHAPES))], -1)
    weights = track.supports.mean(-1) * np.where(track.clipped, 0.02, 1.0)
    errors = np.average(np.minimum(nearest, 0.2), axis=0, weights=weights)
    return _SHAPES[int(errors.argmin())], float(errors.min())


@cache
def _ground_table(shape: Shape, size: Size) -> FloatArray:
    """For an object on the floor, `[places, 4]` from far to near: z, height, bottom edge, frame heights a unit."""
    radius, rows = world.RADIUS[size], []
    for z in np.linspace(-8, 3.5, 70):
        support = _project(shape, radius, (0.0, radius, float(z)), np.pi / 8)
        axis = Camera.still(1).project(_f32([[[0, radius, z]], [[1, radius, z]]]), 1, 1)[:, 0, 0]
        rows.append((z, support[_DOWN] + support[_UP], support[_DOWN], axis[1] - axis[0]))
    return _f32(rows)


def _find_size(track: _Track, shape: Shape) -> Size:
    """Small or large, from the height of the outline where its foot is lowest, so on the floor."""
    whole = ~track.clipped if (~track.clipped).sum() >= 2 else np.ones(len(track.clipped), np.bool_)
    heights = (track.supports[:, _DOWN] + track.supports[:, _UP])[whole]
    bottoms = track.supports[whole, _DOWN]
    low = bottoms >= np.sort(bottoms)[-min(3, len(bottoms))]
    misfits = []
    for size in _SIZES:
        _, height, bottom, _ = _ground_table(shape, size).T
        expected = np.interp(bottoms[low], bottom, height)
        misfits.append(abs(float(np.median(np.log(heights[low] / expected)))))
    return _SIZES[int(np.argmin(misfits))]


# Motion ---------------------------------------------------------------------------------------------------------------


def _find_motion(track: _Track, shape: Shape, size: Size, pixels: FloatArray, mask: BoolArray) -> Motion:
    """The motion whose least speed in the world is exceeded most."""
    whole = ~track.clipped if (~track.clipped).sum() >= 5 else np.ones(len(track.clipped), np.bool_)
    times, supports = track.times[whole], track.supports[whole]
    z, height, bottom, scale = _ground_table(shape, size).T
    heights = supports[:, _DOWN] + supports[:, _UP]
    x = (supports[:, _RIGHT] - supports[:, _LEFT]) / 2 / np.interp(heights, height, scale)
    lift = (np.interp(heights, height, bottom) - supports[:, _DOWN]) / np.interp(heights, height, scale)
    sideways = _slope(times, x)
    nearer = _slope(times, np.interp(heights, height, z))
    bounce = float(np.percentile(lift, 92) - np.percentile(lift, 8))
    scores: dict[Motion, float] = {
        "right": sideways / 1.0,
        "left": -sideways / 1.0,
        "closer": nearer / 1.7,
        "away": -nearer / 1.7,
        "bouncing": bounce / 0.8,
    }
    best = max(scores, key=lambda motion: scores[motion])
    if scores[best] > 0.5:
        return best
    return "spinning" if _turning(pixels, mask) > 0.5 else "still"


def _slope(times: FloatArray, values: FloatArray) -> float:
    """Theil-Sen slope: the median over all pairs, deaf to a few outliers."""
    first, second = np.triu_indices(len(times), max(1, len(times) // 4))
    if not len(first):
        return 0.0
    return float(np.median((values[second] - values[first]) / (times[second] - times[first])))


def _turning(pixels: FloatArray, mask: BoolArray) -> float:
    """How much a standing object's shading changes in half a second: about 0 at rest, 1 and more when a cube turns."""
    apart = min(world.FPS // 2, len(pixels) - 1)
    both = mask[apart:] & mask[:-apart]
    if not both.any():
        return 0.0
    change = np.abs(pixels[apart:].mean(-1) - pixels[:-apart].mean(-1))[both]
    level = pixels[mask].mean()
    return float(change.mean() / level / 0.1)

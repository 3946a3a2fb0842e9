"""Objects as coloured patches: which one or two of the world's colours stand before an empty scene, and where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from models.mini.rays import FloatArray, array
from models.mini.world import OBJECT_RGB, Color, Sun

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

_COLORS: tuple[Color, ...] = get_args(Color)
_MAX_COLOR_ERROR = 0.14  # mean distance in RGB (0..1), at most 0.2 a pixel; beyond it the nearest match is no match
_LEAST_AREA = 1.5e-3  # of a frame's height squared: the least patch that is an object
# Of two objects' pixels, in RGB distance under a light of brightness 1: how much better they fit their own colour than
# the other's, and how well. A rim, which mixes an object's colour with that of what is behind it, is no object.
_LEAST_GAIN, _MAX_MISFIT, _MAX_RIM = 0.10, 0.10, 0.58


@dataclass(frozen=True, slots=True)
class Patch:
    """An object's colour (`None` if it has none of the world's) and its pixels `[frames, height, width]`."""

    color: Color | None
    mask: BoolArray

    def seen(self) -> BoolArray:
        """In which frames `[frames]` there is enough of it."""
        return np.asarray(self.mask.sum((1, 2)) > _LEAST_AREA * self.mask.shape[1] ** 2)


@cache
def _palette(color: Color, sun: Sun) -> FloatArray:
    """Colours `[shades, 3]` that an object of this colour shows under this sun."""
    shades = [
        array(sun.color) * 1.15 * diffuse + array(sun.ambient) * bounce
        for diffuse, bounce in product(np.linspace(0, 1, 12), (0.55, 0.75, 0.95))
    ]
    return array(np.clip(array(OBJECT_RGB[color]) * 0.97 * array(shades), 0, 1))


def _distance_to_color(pixels: FloatArray, color: Color, sun: Sun) -> FloatArray:
    """Distance `[pixels]` of `pixels` `[pixels, 3]` from the nearest shade of a colour."""
    palette = _palette(color, sun)
    squares = np.square(pixels).sum(-1)[:, None] - 2 * pixels @ palette.T + np.square(palette).sum(-1)
    return array(np.sqrt(np.maximum(squares.min(-1), 0)))


def find_patches(pixels: FloatArray, strange: FloatArray, sun: Sun, most: int = 2) -> list[Patch]:
    """The objects, at most `most` (1 or 2), the larger first.

    `strange` `[frames, height, width]` is how far `pixels` are from every shade of the empty scene.
    """
    brightness = float(np.mean(sun.color) + np.mean(sun.ambient))
    threshold = 0.07 * brightness
    sure = strange > 1.5 * threshold
    if sure.sum() < 12 * len(pixels):
        return []
    core = sure & _inside(strange > threshold)  # no rims, which have no object's colour
    core = core if core.sum() > 12 * len(pixels) else sure
    found, weight = pixels[core], np.minimum(strange[core], 0.4)
    step = max(1, len(found) // 4000)
    found, weight = found[::step], weight[::step] / weight[::step].sum()
    distances = {c: np.minimum(_distance_to_color(found, c, sun), 0.2) for c in _COLORS}
    one = min(_COLORS, key=lambda c: weight @ distances[c])
    mask = strange > threshold
    if most > 1:
        pair = min(combinations(_COLORS, 2), key=lambda p: weight @ np.minimum(distances[p[0]], distances[p[1]]))
        if patches := _split(pixels, strange, mask, pair, sun, brightness):
            return patches
    mask[mask] = strange[mask] > _distance_to_color(pixels[mask], one, sun)
    known = weight @ distances[one] < _MAX_COLOR_ERROR
    return [Patch(one if known else None, _largest_patches(_without_specks(mask)))]


def _split(
    pixels: FloatArray, strange: FloatArray, mask: BoolArray, pair: tuple[Color, Color], sun: Sun, brightness: float
) -> list[Patch]:
    """Two patches; none unless both are seen in half of the frames and neither is a shade or the rim of the other."""
    inside = pixels[mask]
    distances = [_distance_to_color(inside, color, sun) for color in pair]
    patches = []
    for color, own, others in zip(pair, distances, reversed(distances), strict=True):
        part = np.zeros_like(mask)
        part[mask] = (own < others) & (own < strange[mask])
        part = _largest_patches(_without_specks(part))
        patch = Patch(color, part)
        if patch.seen().mean() < 0.5:
            return []
        misfit, gain = np.median(own[part[mask]]), np.median((others - own)[part[mask]])
        rim = 1 - np.median(_inside(part).sum((1, 2)) / np.maximum(part.sum((1, 2)), 1))
        if gain < _LEAST_GAIN * brightness or misfit > _MAX_MISFIT * brightness or rim > _MAX_RIM:
            return []
        patches.append(patch)
    return sorted(patches, key=lambda patch: -int(patch.mask.sum()))


def _without_specks(mask: BoolArray) -> BoolArray:
    """Pixels of the mask that have three neighbours in it."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return np.asarray(mask & (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] >= 4))


def _inside(mask: BoolArray) -> BoolArray:
    """Pixels of the mask whose eight neighbours are in it."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] & padded[:, 1:-1] & padded[:, 2:]
    return np.asarray(rows[..., :-2] & rows[..., 1:-1] & rows[..., 2:])


def _largest_patches(mask: BoolArray) -> BoolArray:
    """Of each frame the largest connected patch, and others nearly as large: an object in front may cut one in two."""
    kept = np.zeros_like(mask)
    for index in range(len(mask)):
        for row, left, right in zip(*_large_runs(mask[index]), strict=True):
            kept[index, row, left:right] = True
    return kept & mask


def _large_runs(mask: BoolArray) -> tuple[IntArray, IntArray, IntArray]:
    """Row, left and right (exclusive) of the runs of the large patches of `mask` `[height, width]`."""
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
    if not len(y):
        return y, left, right
    label = np.array([root(run) for run in range(len(y))], np.int64)
    areas = np.bincount(label, right - left)
    large = areas[label] > 0.3 * areas.max()
    return y[large], left[large], right[large]

"""Reads a clip's attributes back from its pixels, with what is known of the world: cameras, floors, lights, colours.

Nothing is learned. The floor, the light and the camera are those whose empty scene explains the frames best
(`backdrop.py`); what no shade of that scene explains is an object (`patches.py`); its outline is compared with those of
the four shapes (`outlines.py`); its path in world units gives size, motion and relation (`paths.py`). Edges may be soft
and colours somewhat off: choices are by nearest match.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.mini.backdrop import Backdrop, find_backdrop
from models.mini.outlines import DOWN, Match, Outlines, find_shape, trace
from models.mini.patches import Patch, find_patches
from models.mini.paths import Path, find_motion, find_path, find_relation, find_size, turning
from models.mini.rays import FloatArray, Shape, array
from models.mini.scene import FPS
from models.mini.world import Attributes, CameraMove, Color, Floor, Kind, Light, Motion, Relation, Size

# Beyond these the nearest match is no match. Rendered clips stay near or below half of each.
_MAX_SETTING_ERROR = 0.13  # mean distance in RGB (0..1), at most 0.25 a pixel; the objects are in it
_MAX_SHAPE_ERROR = 0.05  # mean distance between outlines of mean width 1
# A two-beat clip changes somewhere between these (seconds).
_CHANGE = (0.9, 1.1)
_SPINNING = 1.0  # in `turning`'s measure
_TWO_OBJECTS_PACE = 0.5
_REVERSED: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "in front of": "behind",
    "behind": "in front of",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge sees; `None` where it is nothing of the world's: no object, or another shape, colour or place.

    Of two objects the first is the one that moves; `other_*` and `relation` (where the first is) are `None` where there
    is one object, and `then` is where no second beat was asked after.
    """

    shape: Shape | None = None
    color: Color | None = None
    size: Size | None = None
    motion: Motion | None = None
    floor: Floor | None = None
    light: Light | None = None
    camera: CameraMove | None = None
    then: Motion | None = None
    other_shape: Shape | None = None
    other_color: Color | None = None
    other_size: Size | None = None
    other_motion: Motion | None = None
    relation: Relation | None = None

    @property
    def objects(self) -> int:
        return 2 if self.relation else 1 if self.color or self.shape else 0

    def swapped(self) -> Verdict:
        """The same sight, told with the other object first."""
        if self.relation is None:
            return self
        return replace(
            self,
            shape=self.other_shape,
            color=self.other_color,
            size=self.other_size,
            motion=self.other_motion,
            other_shape=self.shape,
            other_color=self.color,
            other_size=self.size,
            other_motion=self.motion,
            relation=_REVERSED[self.relation],
        )

    def right(self, attributes: Attributes) -> dict[str, bool]:
        """For each attribute that `attributes` has whether it is seen so; two objects are told in the better order.

        Of one object also whether it is `alone`.
        """
        readings = [_right(self, attributes)]
        if attributes.other:
            readings.append(_right(self.swapped(), attributes))
        return max(readings, key=lambda reading: sum(reading.values()))


def _right(verdict: Verdict, attributes: Attributes) -> dict[str, bool]:
    seen = asdict(verdict)
    asked = {k: v for k, v in attributes.to_json().items() if k not in ("then", "other")}
    right = {name: seen[name] == value for name, value in asked.items()}
    if attributes.then:
        right["then"] = verdict.then == attributes.then
    if attributes.other is None:
        return right | {"alone": verdict.relation is None}
    other = attributes.other
    right["motion"] &= verdict.other_motion == "still"
    return right | {
        "other_shape": verdict.other_shape == other.shape,
        "other_color": verdict.other_color == other.color,
        "other_size": verdict.other_size == other.size,
        "relation": verdict.relation == other.relation,
    }


@dataclass(frozen=True, slots=True)
class Thing:
    """One object as it is seen: what it is, its mean colour (RGB, 0..1), its radius in units."""

    shape: Shape | None
    color: Color | None
    size: Size | None
    motion: Motion | None
    then: Motion | None
    rgb: tuple[float, float, float]
    radius: float
    path: Path | None


def judge(frames: NDArray[np.uint8], kind: Kind | None = None, start_seconds: float = 0.0) -> Verdict:
    """Attributes of a clip `[frames, height, width, 3]`: RGB, `FPS` frames a second.

    `kind` is what was asked for: only for "beats" a second beat is looked for. A clip may be a window out of a longer
    one, from `start_seconds` on: pans and zooms have ended after two seconds, an orbit is then found at any angle.
    """
    return look(frames, kind, start_seconds)[0]


def look(
    frames: NDArray[np.uint8], kind: Kind | None = None, start_seconds: float = 0.0
) -> tuple[Verdict, tuple[Thing, ...]]:
    """The verdict, and the objects that it stands on: the first, and the other if there are two."""
    pixels = _smooth(array(frames) / np.float32(255))
    backdrop, pixels = find_backdrop(pixels, start_seconds)
    strange = backdrop.strangeness(pixels)
    if np.minimum(strange, 0.25).mean() > _MAX_SETTING_ERROR:
        return Verdict(), ()
    setting = backdrop.setting
    place = Verdict(floor=setting.floor, light=setting.light, camera=backdrop.course.move)
    patches = find_patches(pixels, strange, setting.sun)
    matches = _match(patches, backdrop)
    things = [
        _describe(pixels, patch, match, backdrop, kind == "beats", _TWO_OBJECTS_PACE if len(patches) > 1 else 1.0)
        for patch, match in zip(patches, matches, strict=True)
    ]
    if not things:
        return place, ()
    if len(things) == 2 and things[0].motion == "still" and things[1].motion not in ("still", None):
        things.reverse()
    first = things[0]
    verdict = replace(
        place, shape=first.shape, color=first.color, size=first.size, motion=first.motion, then=first.then
    )
    other = things[1] if len(things) == 2 else None
    if other and first.path and other.path:
        verdict = replace(
            verdict,
            other_shape=other.shape,
            other_color=other.color,
            other_size=other.size,
            other_motion=other.motion,
            relation=find_relation(first.path, other.path),
        )
    return verdict, tuple(things)


def _smooth(pixels: FloatArray) -> FloatArray:
    """A light blur (1, 2, 1) in both directions against noise."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    across = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return np.asarray((across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]) / 16, np.float32)


def _match(patches: list[Patch], backdrop: Backdrop) -> list[Match | None]:
    """Each patch's shape; of two, the one whose foot is lower in the picture hides the other."""
    masks = [patch.mask for patch in patches]
    camera = backdrop.camera
    traces = [trace(mask, None, camera) for mask in masks]
    if len(masks) == 2 and traces[0] and traces[1]:
        front = 0 if _foot(traces[0]) > _foot(traces[1]) else 1
        traces[1 - front] = trace(masks[1 - front], masks[front], camera)
    return [find_shape(outlines) if outlines else None for outlines in traces]


def _foot(outlines: Outlines) -> float:
    return float(np.percentile(outlines.supports[:, DOWN], 90))


def _describe(
    pixels: FloatArray, patch: Patch, match: Match | None, backdrop: Backdrop, beats: bool, pace: float
) -> Thing:
    red, green, blue = (float(v) for v in pixels[patch.mask].mean(0)) if patch.mask.any() else (0.0, 0.0, 0.0)
    if match is None:
        return Thing(None, patch.color, None, None, None, (red, green, blue), 0.0, None)
    size = find_size(match)
    path = find_path(match, size, backdrop.camera)

    def motion_in(start: float, end: float) -> Motion:
        motion, _ = find_motion(path.between(start, end), pace)
        if motion:
            return motion
        part = slice(round(start * FPS), min(len(pixels), round(end * FPS) + 1))
        turns = turning(pixels, patch.mask, match, backdrop.camera, part)
        return "spinning" if turns > _SPINNING else "still"

    length = len(pixels) / FPS
    motion = motion_in(0.0, _CHANGE[0] if beats else length)
    then = motion_in(_CHANGE[1], length) if beats else None
    shape = match.shape if match.error < _MAX_SHAPE_ERROR else None
    return Thing(shape, patch.color, size, motion, then, (red, green, blue), path.radius, path)

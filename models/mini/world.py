"""The clip world: what a clip can show, and what is kept from training.

One or two objects stand on a tiled floor under one of three lights. The first object moves, in one way or in two beats;
the camera may move too. `scene.py` places all this, `render.py` draws it, `captions.py` speaks of it, `judge.py` reads
it back.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from models.mini.rays import Shape

Color = Literal["red", "green", "blue", "yellow", "purple", "orange", "white", "cyan"]
Size = Literal["small", "large"]
Motion = Literal["left", "right", "closer", "away", "bouncing", "spinning", "still"]
Floor = Literal["grey", "green", "sand", "navy"]
Light = Literal["noon", "sunset", "night"]
CameraMove = Literal["still", "pan left", "pan right", "orbit", "zoom in", "zoom out"]
Relation = Literal["left of", "right of", "in front of", "behind"]
Kind = Literal["one", "beats", "two"]

HELD_OUT_SHARE = 0.1
KIND_SHARES: dict[Kind, float] = {"one": 0.58, "beats": 0.12, "two": 0.30}
STILL_CAMERA_SHARE = 0.4
# What the first of two objects may do: nothing that changes which side of the other it is on.
MOTIONS_BESIDE: dict[Relation, tuple[Motion, ...]] = {
    "left of": ("left", "bouncing", "spinning", "still"),
    "right of": ("right", "bouncing", "spinning", "still"),
    "in front of": ("closer", "bouncing", "spinning", "still"),
    "behind": ("away", "bouncing", "spinning", "still"),
}

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
class Other:
    """A second object, which stands still, and where the first one is as the world's camera sees it."""

    shape: Shape
    color: Color
    size: Size
    relation: Relation


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a caption says of a clip and what the judge reads back from its pixels.

    `then` is what the object does in a two-beat clip's second beat.
    """

    shape: Shape
    color: Color
    size: Size
    motion: Motion
    floor: Floor
    light: Light
    camera: CameraMove = "still"
    then: Motion | None = None
    other: Other | None = None

    @property
    def kind(self) -> Kind:
        return "two" if self.other else "beats" if self.then else "one"

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept from training; decided by a hash, so that it never changes."""
        parts: list[str] = [
            self.shape,
            self.color,
            self.size,
            self.motion,
            self.floor,
            self.light,
            self.camera,
            self.then or "",
        ]
        if self.other:
            parts += [self.other.shape, self.other.color, self.other.size, self.other.relation]
        return hashlib.sha256("/".join(parts).encode()).digest()[0] < 256 * HELD_OUT_SHARE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Attributes:
        return cls(**{**row, "other": Other(**row["other"]) if row.get("other") else None})


def all_attributes() -> list[Attributes]:
    """Every combination of one object with one motion; only a cube can be seen to spin."""
    values = product(*(get_args(kind) for kind in (Shape, Color, Size, Motion, Floor, Light, CameraMove)))
    return [a for a in (Attributes(*v) for v in values) if a.motion != "spinning" or a.shape == "cube"]


def draw(rng: np.random.Generator, held_out: bool = False, kind: Kind | None = None) -> Attributes:
    """A random combination of the training part, or of the part held out; of one kind, or of all by `KIND_SHARES`."""
    kinds = list(KIND_SHARES)
    kind = kind or kinds[rng.choice(len(kinds), p=list(KIND_SHARES.values()))]
    while True:
        attributes = _draw(rng, kind)
        if attributes.held_out == held_out:
            return attributes


_T = TypeVar("_T")


def _draw(rng: np.random.Generator, kind: Kind) -> Attributes:
    def pick(values: tuple[_T, ...]) -> _T:
        return values[rng.integers(len(values))]

    shape: Shape = pick(get_args(Shape))
    color: Color = pick(get_args(Color))
    size: Size = pick(get_args(Size))
    motions = tuple(m for m in get_args(Motion) if m != "spinning" or shape == "cube")
    moves = get_args(CameraMove)
    camera: CameraMove = "still" if rng.random() < STILL_CAMERA_SHARE else pick(moves[1:])
    then, other = None, None
    motion: Motion = pick(motions)
    if kind == "beats":
        then = pick(tuple(m for m in motions if m != motion))
    elif kind == "two":
        relation: Relation = pick(get_args(Relation))
        other_shape: Shape = pick(get_args(Shape))
        other = Other(
            other_shape, pick(tuple(c for c in get_args(Color) if c != color)), pick(get_args(Size)), relation
        )
        motion = pick(tuple(m for m in MOTIONS_BESIDE[relation] if m in motions))
    return Attributes(shape, color, size, motion, pick(get_args(Floor)), pick(get_args(Light)), camera, then, other)

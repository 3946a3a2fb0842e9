"""What the evaluation asks for: held-out clips, always the same ones, as captions or in loose words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from models.mini.captions import canonical
from models.mini.paraphrases import paraphrase
from models.mini.world import Attributes, CameraMove, Kind, Motion, draw

Group = Literal["one", "two", "beats", "loose", "loose, rewritten", "long"]

# What can go on for a minute in one place.
LASTING_MOTIONS: tuple[Motion, ...] = ("bouncing", "spinning", "still")
LASTING_CAMERAS: tuple[CameraMove, ...] = ("still", "orbit")


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt, what its video should show, and what else the request says."""

    group: Group
    attributes: Attributes
    prompt: str
    seed: int
    options: dict[str, object] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, object]:
        return {"prompt": self.prompt, "seed": self.seed, **self.options}


def held_out(count: int, kind: Kind = "one", seed: int = 0, lasting: bool = False) -> list[Attributes]:
    """`count` held-out combinations of a kind, none twice, in an order that `seed` fixes."""
    rng = np.random.default_rng([seed, get_args(Kind).index(kind)])
    chosen: dict[Attributes, None] = {}
    while len(chosen) < count:
        attributes = draw(rng, held_out=True, kind=kind)
        if not lasting or (attributes.motion in LASTING_MOTIONS and attributes.camera in LASTING_CAMERAS):
            chosen[attributes] = None
    return list(chosen)


def captioned(kind: Kind, count: int) -> list[Ask]:
    """Canonical captions of held-out combinations, at the service's default settings."""
    return [Ask(kind, a, canonical(a), seed) for seed, a in enumerate(held_out(count, kind))]


def loosely(count: int, rewrite: bool) -> list[Ask]:
    """The first one-object clips of `captioned` in loose words that name all of them, with and without a rewriter.

    The words and their order are ones that the rewriter was not trained on.
    """
    rng = np.random.default_rng(1)
    group: Group = "loose, rewritten" if rewrite else "loose"
    return [
        Ask(group, a, paraphrase(a, rng, held_out=True, full=True).text, seed, {"rewrite_prompt": rewrite})
        for seed, a in enumerate(held_out(count))
    ]


def lasting(count: int, seconds: int) -> list[Ask]:
    """Long videos of objects that bounce, spin or stand."""
    asked = held_out(count, seed=2, lasting=True)
    return [Ask("long", a, canonical(a), seed, {"seconds": seconds}) for seed, a in enumerate(asked)]

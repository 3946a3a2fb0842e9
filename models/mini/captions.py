"""Captions of the clip world in many wordings, and the tokenizer that is trained on them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, cast, get_args

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from models.mini.rays import Shape
from models.mini.world import Attributes, CameraMove, Color, Floor, Light, Motion, Other, Relation, Size, draw

NOUNS = {
    "ball": ("ball", "ball", "sphere"),
    "cube": ("cube", "cube", "box", "block"),
    "cylinder": ("cylinder", "cylinder", "drum"),
    "cone": ("cone", "cone", "pyramid"),
}
SIZES = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
COLORS = {"purple": ("purple", "purple", "violet"), "cyan": ("cyan", "cyan", "turquoise")}
MOTIONS = {
    "left": ("moving left", "moving to the left", "moves left", "going left", "sliding to the left"),
    "right": ("moving right", "moving to the right", "moves right", "going right", "sliding to the right"),
    "closer": ("coming closer", "comes closer", "approaching", "moving towards the camera", "coming nearer"),
    "away": ("going away", "goes away", "receding", "moving away from the camera", "moving into the distance"),
    "bouncing": ("bouncing", "bounces", "bouncing up and down", "jumping up and down"),
    "spinning": ("spinning", "spins", "rotating", "turning around", "spinning in place"),
    "still": ("standing still", "stands still", "at rest", "not moving", "resting"),
}
FLOORS = {
    "grey": ("on a grey floor", "on a gray floor", "on grey ground"),
    "green": ("on a green floor", "on grass", "on green ground"),
    "sand": ("on a sand floor", "on sand", "on a sandy floor"),
    "navy": ("on a navy floor", "on a dark blue floor", "on navy ground"),
}
LIGHTS = {
    "noon": ("at noon", "at midday", "in daylight", "under the noon sun"),
    "sunset": ("at sunset", "at dusk", "in the evening light", "under a setting sun"),
    "night": ("at night", "by night", "in the dark", "in moonlight"),
}
CAMERAS: dict[CameraMove, tuple[str, ...]] = {
    "still": ("the camera stays still", "a static camera", "the camera does not move", "a fixed shot"),
    "pan left": ("the camera pans left", "the camera pans to the left", "a pan to the left", "panning left"),
    "pan right": (
        "the camera pans right",
        "the camera pans to the right",
        "a pan to the right",
        "the camera turns right",
    ),
    "orbit": (
        "the camera orbits",
        "the camera circles around",
        "an orbiting camera",
        "the camera moves around the scene",
    ),
    "zoom in": ("the camera zooms in", "a zoom in", "zooming in", "the camera slowly zooms in"),
    "zoom out": ("the camera zooms out", "a zoom out", "zooming out", "the camera slowly zooms out"),
}
RELATIONS: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "in front of": ("in front of", "nearer than", "closer than"),
    "behind": ("behind", "at the back of", "farther than"),
}
ALL_COLORS: tuple[Color, ...] = get_args(Color)
BEATS = ("then", "and then", "and after that", "before")
SPOKEN_EVERYWHERE = ("a video of", "a clip of", "there is", "we see", "footage of", "a shot of")


def canonical(attributes: Attributes) -> str:
    """The plain caption that names every attribute; a camera that isn't named stays still."""
    a = attributes
    motion = MOTIONS[a.motion][0]
    if a.then:
        motion += f", then {MOTIONS[a.then][0]}"
    second = f" {a.other.relation} a {a.other.size} {a.other.color} {a.other.shape}" if a.other else ""
    camera = "" if a.camera == "still" else f", {CAMERAS[a.camera][0]}"
    thing = f"a {a.size} {a.color} {a.shape}"
    return f"{thing} {motion}{second} {FLOORS[a.floor][0]} {LIGHTS[a.light][0]}{camera}"


def read(text: str) -> Attributes | None:
    """The attributes of a canonical caption; None for any other text."""
    found = _CANONICAL.fullmatch(text)
    if found is None:
        return None
    other = None
    if found["relation"]:
        other = Other(
            cast(Shape, found["other_shape"]),
            cast(Color, found["other_color"]),
            cast(Size, found["other_size"]),
            cast(Relation, found["relation"]),
        )
    return Attributes(
        cast(Shape, found["shape"]),
        cast(Color, found["color"]),
        cast(Size, found["size"]),
        cast(Motion, _VALUES[found["motion"]]),
        cast(Floor, _VALUES[found["floor"]]),
        cast(Light, _VALUES[found["light"]]),
        cast(CameraMove, _VALUES[found["camera"]] if found["camera"] else "still"),
        cast(Motion | None, found["then"] and _VALUES[found["then"]]),
        other,
    )


def _canonical_pattern() -> re.Pattern[str]:
    def group(name: str, words: Iterable[str]) -> str:
        return f"(?P<{name}>{'|'.join(words)})"

    def thing(prefix: str) -> str:
        parts = (("size", SIZES), ("color", ALL_COLORS), ("shape", NOUNS))
        return "a " + " ".join(group(prefix + name, words) for name, words in parts)

    motions, floors, lights, cameras = ([w[0] for w in table.values()] for table in (MOTIONS, FLOORS, LIGHTS, CAMERAS))
    return re.compile(
        f"{thing('')} {group('motion', motions)}(?:, then {group('then', motions)})?"
        f"(?: {group('relation', RELATIONS)} {thing('other_')})?"
        f" {group('floor', floors)} {group('light', lights)}(?:, {group('camera', cameras)})?"
    )


_CANONICAL = _canonical_pattern()
_VALUES = {w[0]: value for table in (MOTIONS, FLOORS, LIGHTS, CAMERAS) for value, w in table.items()}


def caption(attributes: Attributes, rng: np.random.Generator, plain_share: float = 0.3) -> str:
    """One random wording, long or short, in loose order; `plain_share` of them are the canonical caption.

    Now and then size, floor or light stays unsaid. Colour, shape, motion and relation are always said, and so is a
    camera that moves.
    """
    a = attributes
    if rng.random() < plain_share:
        return canonical(a)

    def pick(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    def thing(shape: Shape, color: Color, size: Size) -> str:
        said = "" if rng.random() < 0.12 else pick(SIZES[size]) + " "
        return with_article(f"{said}{pick(COLORS.get(color, (color,)))} {pick(NOUNS[shape])}")

    motion = pick(MOTIONS[a.motion])
    if a.then:
        link = pick(BEATS)
        # "Before" wants the -ing form, which is each motion's first wording.
        motion = (
            f"{motion} before {MOTIONS[a.then][0]}" if link == "before" else f"{motion}, {link} {pick(MOTIONS[a.then])}"
        )
    first = thing(a.shape, a.color, a.size)
    second = ""
    if a.other:
        second = f" {pick(RELATIONS[a.other.relation])} {thing(a.other.shape, a.other.color, a.other.size)}"
    places = [pick(FLOORS[a.floor])] if rng.random() > 0.08 else []
    times = [pick(LIGHTS[a.light])] if rng.random() > 0.08 else []
    where = [*places, *times]
    if len(where) == 2 and rng.random() < 0.3:
        where.reverse()
    if where and rng.random() < 0.15:
        *where, front = where
        text = f"{front}, " + " ".join([first, motion + second, *where])
    elif a.other and rng.random() < 0.3:
        text = " ".join([first + second, *where]) + f", the first one {motion}"
    else:
        text = " ".join([first, motion + second, *where])
        if rng.random() < 0.1:
            text = f"{pick(SPOKEN_EVERYWHERE)} {text}"
    if a.camera != "still" or rng.random() < 0.3:
        camera = pick(CAMERAS[a.camera])
        text = f"{camera}: {text}" if rng.random() < 0.15 else f"{text}, {camera}"
    return text


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@cache
def build_tokenizer() -> Tokenizer:
    """A byte-level BPE trained on the captions: their words are one token each, and any other text still encodes."""
    rng = np.random.default_rng(0)
    corpus = [caption(draw(rng, held_out=bool(index % 2)), rng) for index in range(12000)]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, length: int) -> Any:
    """The same tokenizer as transformers (and so `WanPipeline`) wants it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=length
    )

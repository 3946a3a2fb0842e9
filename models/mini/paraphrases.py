"""Loose wordings of a clip, as people type them: the rewriter learns to turn them into canonical captions.

Telegraph style, synonyms that no caption has, any word order, parts left out, politeness, questions, typing errors.
Some wordings, templates and openings are kept from training: the figures are measured on those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from models.mini import captions, loose_words, word_forms
from models.mini.loose_words import Wordings
from models.mini.rays import Shape
from models.mini.word_forms import Patterns, fill
from models.mini.world import Attributes, Color, Floor, Light, Size

# Empty slots leave separators behind, which `_tidy` takes away.
TEMPLATES = (
    (
        "{thing} {motion} {other} {floor} {light}, {camera}",
        "{thing} {motion} {other} {light} {floor}, {camera}",
        "{thing} {other} {motion} {floor} {light}, {camera}",
        "{light}, {floor}: {thing} {motion} {other}, {camera}",
        "{camera}: {thing} {motion} {other} {floor} {light}",
        "{camera}. {thing} {other}. {motion}. {floor}. {light}.",
        "{thing}, {other}, {motion}, {floor}, {light}, {camera}",
        "{thing} / {other} / {motion} / {floor} / {light} / {camera}",
        "{floor} {light} {thing} {motion} {other}. {camera}",
        "{thing} {other} {floor} {light}, the first one {motion}, {camera}",
        "{motion} {thing} {other} {floor}, {light}; {camera}",
        "{light}. {thing} {motion} {other}. {floor}. {camera}.",
        "there's {thing} {other} {floor} {light} and it {motion}. {camera}",
        "{floor}, {camera}, {thing} {motion} {other}, {light}",
        "{camera} and {thing} {motion} {other} {light} {floor}",
        "{thing} that {motion} {other} {floor}. {light}! {camera}",
    ),
    (
        "{light} {floor}, {thing} {motion} {other}; {camera}",
        "{thing} {other} | {motion} | {light} | {floor} | {camera}",
        "{camera}, {light}: {thing} {other} which {motion} {floor}",
        "{thing} {floor} {motion} {other}, {light}, {camera}",
        "{motion}: {thing} {other}, {light}, {floor}, {camera}",
    ),
)
HELD_OUT_WORDING_SHARE = 0.35
TYPO_SHARE = 0.25
# How often a training wording is a form from `word_forms`, and a training template one in random order.
FORM_SHARE = 0.5

# What of a clip a prompt can name; `complete` knows what is taken for the rest.
NAMES = ("shape", "color", "size", "motion", "then", "floor", "light", "camera")
OTHER_NAMES = ("shape", "color", "size", "relation")
# The video's seed chooses among so many ways to fill in what a prompt leaves open.
CHOICES = len(get_args(Size)) * len(get_args(Light)) * len(get_args(Floor))


@dataclass(frozen=True, slots=True)
class Paraphrase:
    """A loose wording of `attributes` and what it names of them; the second object's parts are "other shape" …"""

    text: str
    attributes: Attributes
    named: frozenset[str]


def paraphrase(
    attributes: Attributes, rng: np.random.Generator, held_out: bool = False, full: bool = False
) -> Paraphrase:
    """One loose wording; of the held-out templates, with a share of held-out wordings, when `held_out`.

    `full` leaves nothing out, so that the text means this clip alone.
    """
    named = frozenset(_named(attributes, rng, full))
    text = _Speaker(rng, held_out).say(attributes, named)
    if rng.random() < TYPO_SHARE:
        text = _mistyped(text, rng)
    match rng.integers(8):
        case 0:
            text = text.upper()
        case 1 | 2 | 3:
            text = text[:1].upper() + text[1:]
    return Paraphrase(text, attributes, named)


def complete(paraphrase: Paraphrase, choice: int) -> Attributes:
    """The clip to make of a paraphrase: what it leaves open depends on `choice` (0 to `CHOICES` - 1) alone.

    Nothing moves unasked, and neither does the camera.
    """
    a, named = paraphrase.attributes, paraphrase.named
    sizes, lights, floors = get_args(Size), get_args(Light), get_args(Floor)
    shapes = ("cube",) if a.motion == "spinning" and "motion" in named else get_args(Shape)
    other = a.other
    if other:
        other = replace(
            other,
            shape=other.shape if "other shape" in named else get_args(Shape)[choice % 4],
            color=other.color if "other color" in named else get_args(Color)[(choice + 3) % 8],
            size=other.size if "other size" in named else sizes[choice // 2 % 2],
        )
    return replace(
        a,
        shape=a.shape if "shape" in named else shapes[choice % len(shapes)],
        color=a.color if "color" in named else get_args(Color)[choice % 8],
        size=a.size if "size" in named else sizes[choice % 2],
        motion=a.motion if "motion" in named else "still",
        floor=a.floor if "floor" in named else floors[choice // 6],
        light=a.light if "light" in named else lights[choice // 2 % 3],
        camera=a.camera if "camera" in named else "still",
        other=other,
    )


def part(attributes: Attributes, name: str) -> object:
    """An attribute by the name that `Paraphrase.named` has for it."""
    if name.startswith("other "):
        return attributes.other and getattr(attributes.other, name.removeprefix("other "))
    return getattr(attributes, name)


def _named(a: Attributes, rng: np.random.Generator, full: bool) -> list[str]:
    shares = {"shape": 0.95, "color": 0.96, "size": 0.7, "motion": 0.92, "floor": 0.7, "light": 0.7, "camera": 0.85}
    if a.camera == "still":
        shares["camera"] = 0.15
    if a.then:
        shares |= {"motion": 1.0, "then": 1.0}
    if a.other:
        shares |= {"other shape": 0.97, "other color": 0.95, "other size": 0.65, "other relation": 1.0}
    return [name for name, share in shares.items() if full or rng.random() < share]


class _Speaker:
    """Chooses words; every choice is the generator's."""

    def __init__(self, rng: np.random.Generator, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out

    def say(self, a: Attributes, named: frozenset[str]) -> str:
        slots = dict.fromkeys(("motion", "other", "floor", "light", "camera"), "")
        slots["thing"] = self.thing(*(getattr(a, n) if n in named else None for n in ("shape", "color", "size")))
        for slot in ("motion", "floor", "light", "camera"):
            if slot in named:
                slots[slot] = self.wording(f"{slot}s".upper(), getattr(a, slot))
        if a.then:
            then = self.wording("MOTIONS", a.then)
            beats = self.one_of(loose_words.BEATS, word_forms.BEATS)
            slots["motion"] = beats.format(first=slots["motion"], second=then)
        if a.other:
            other = self.thing(
                *(getattr(a.other, n) if f"other {n}" in named else None for n in ("shape", "color", "size"))
            )
            slots["other"] = self.wording("RELATIONS", a.other.relation).format(other)
        text = _tidy(self.template().format(**slots))
        return self.one_of(loose_words.OPENINGS, word_forms.OPENINGS).format(text)

    def template(self) -> str:
        """A written one, or for training the slots in any order in which the second object follows the first."""
        if self.held_out or self.rng.random() >= FORM_SHARE:
            return self.pick(TEMPLATES[self.held_out])
        slots = ["{thing}", "{motion}", "{other}", "{floor}", "{light}", "{camera}"]
        while True:
            order: list[str] = [slots[i] for i in self.rng.permutation(len(slots))]
            first, second = sorted((order.index("{thing}"), order.index("{other}")))
            order[first], order[second] = "{thing}", "{other}"
            mark = self.pick((",", ",", ".", ";", " -", " /", " |", ""))
            text = order[0] + "".join((mark if self.rng.random() < 0.5 else "") + f" {slot}" for slot in order[1:])
            if text not in TEMPLATES[1]:
                return text

    def thing(self, shape: str | None, color: str | None, size: str | None) -> str:
        noun = self.wording("NOUNS", shape) if shape else self.pick(loose_words.SOMETHING)
        said_color = self.wording("COLORS", color) if color else ""
        said_size = self.wording("SIZES", size) if size else ""
        match self.rng.integers(12):
            case 0:
                words = f"{said_color} {said_size} {noun}"
            case 1 if color and size:
                words = f"{noun}, {said_color} and {said_size},"
            case 2 if color:
                words = f"{said_size} {noun} in {said_color}"
            case 3 if size:
                words = f"{said_color} {noun} ({said_size})"
            case _:
                words = f"{said_size} {said_color} {noun}"
        words = " ".join(words.split())
        article = self.pick(("", "", "a", "a", "a", "the", "one", "some"))
        return captions.with_article(words) if article == "a" else f"{article} {words}".strip()

    def wording(self, table: str, value: str) -> str:
        """Words for a value of one of `loose_words`' tables: the captions' own, loose ones, or forms of those."""
        wordings: Wordings = getattr(loose_words, table)
        known, kept = wordings[value]
        if self.held_out and self.rng.random() < HELD_OUT_WORDING_SHARE:
            return self.pick(kept)
        forms: Patterns = getattr(word_forms, table)
        if not self.held_out and self.rng.random() < FORM_SHARE:
            return fill(self.pick(forms[value]), self.rng)
        plain: Mapping[str, Sequence[str]] = {} if table == "RELATIONS" else getattr(captions, table)
        own: Sequence[str] = (value,) if table == "COLORS" else ()
        words = [*known, *plain.get(value, own)]
        return self.pick(words)

    def one_of(self, parts: tuple[tuple[str, ...], tuple[str, ...]], forms: Sequence[str]) -> str:
        """A frame with {} in it; forms are for training alone."""
        if not self.held_out and self.rng.random() < FORM_SHARE / 2:
            return fill(self.pick(forms), self.rng)
        return self.pick(parts[self.held_out])

    def pick(self, words: Sequence[str]) -> str:
        return words[int(self.rng.integers(len(words)))]


def _tidy(text: str) -> str:
    """Without the separators of empty slots."""
    parts = [" ".join(part.split()) for part in re.split(r"([,.:;!/|]|(?<= )-(?= ))", text)]
    kept: list[str] = []
    for part, separator in zip(parts[::2], [*parts[1::2], ""], strict=True):
        if part:
            kept += [part, separator]
    text = re.sub(r" (?:and it|that|which|the first one)(?=[,.]|$)", "", re.sub(r"\s+([,.:;!])", r"\1", " ".join(kept)))
    return re.sub(r"^and ", "", text.strip(" ,;:/|-"))


def _mistyped(text: str, rng: np.random.Generator) -> str:
    """One or two typing errors, each inside a word of four letters or more."""
    for _ in range(rng.integers(1, 3)):
        places = [m.start() for m in re.finditer(r"(?<=[a-z])[a-z](?=[a-z]{2})", text)]
        if not places:
            break
        at = places[rng.integers(len(places))]
        match rng.integers(4):
            case 0:
                text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
            case 1:
                text = text[:at] + text[at + 1 :]
            case 2:
                text = text[:at] + text[at] + text[at:]
            case _:
                text = text[:at] + "abcdefghijklmnopqrstuvwxyz"[rng.integers(26)] + text[at + 1 :]
    return text

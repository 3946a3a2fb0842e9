"""Loose wordings mean the clip that they were made of, and what is held out stays out."""

import re

import numpy as np

from models.mini import loose_words
from models.mini.captions import canonical, read
from models.mini.paraphrases import CHOICES, Paraphrase, complete, paraphrase
from models.mini.world import Attributes, Other, draw


def many(count: int, **options: bool) -> list[Paraphrase]:
    rng = np.random.default_rng(3)
    return [paraphrase(draw(rng), rng, **options) for _ in range(count)]


def test_a_canonical_caption_reads_back() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        attributes = draw(rng)
        assert read(canonical(attributes)) == attributes
    assert read("a red ball") is None
    assert read(canonical(attributes) + " again") is None


def test_what_is_named_is_kept_and_the_rest_depends_on_the_choice_alone() -> None:
    clip = Attributes("cone", "red", "small", "left", "navy", "night", "orbit", None, None)
    some = Paraphrase("", clip, frozenset({"color", "floor"}))
    done = [complete(some, choice) for choice in range(CHOICES)]
    assert {(a.color, a.floor, a.motion, a.camera) for a in done} == {("red", "navy", "still", "still")}
    assert len({(a.size, a.light) for a in done}) == 6
    other = Attributes("ball", "green", "large", "bouncing", "sand", "noon")
    same = Paraphrase("", other, frozenset())
    assert len({canonical(complete(same, 5)), canonical(complete(Paraphrase("", clip, frozenset()), 5))}) == 1
    assert len({(a.size, a.light, a.floor) for a in (complete(same, choice) for choice in range(CHOICES))}) == CHOICES


def test_a_full_paraphrase_leaves_nothing_open() -> None:
    for said in many(200, full=True):
        assert {complete(said, choice) for choice in range(CHOICES)} == {said.attributes}
        assert len(said.named) == 7 + bool(said.attributes.then) + 4 * bool(said.attributes.other)


def test_texts_are_tidy_and_differ() -> None:
    said = [p.text for p in many(300)]
    assert len(set(said)) > 290
    for text in said:
        assert text.strip() == text
        assert not re.search(r"[{}]|  |^[,.;:/]", text), text


def test_a_spinning_thing_without_a_name_is_a_cube() -> None:
    clip = Attributes("cube", "red", "small", "spinning", "navy", "night")
    assert {complete(Paraphrase("", clip, frozenset({"motion"})), c).shape for c in range(CHOICES)} == {"cube"}


def test_a_second_object_keeps_its_place() -> None:
    clip = Attributes("ball", "red", "small", "left", "sand", "noon", other=Other("cube", "blue", "large", "left of"))
    done = complete(Paraphrase("", clip, frozenset({"other relation", "other color"})), 2)
    assert done.other is not None
    assert (done.other.relation, done.other.color) == ("left of", "blue")


def test_no_wording_is_both_trained_on_and_held_out() -> None:
    tables = ("NOUNS", "SIZES", "COLORS", "MOTIONS", "FLOORS", "LIGHTS", "CAMERAS", "RELATIONS")
    for table in tables:
        rows = getattr(loose_words, table)
        known = {word for words, _ in rows.values() for word in words}
        kept = {word for _, words in rows.values() for word in words}
        assert not known & kept
        assert len(known) == sum(len(words) for words, _ in rows.values())
    for known_parts, kept_parts in (loose_words.BEATS, loose_words.OPENINGS):
        assert not set(known_parts) & set(kept_parts)

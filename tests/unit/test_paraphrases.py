"""Loose wordings mean the clip that they were made of, and what is held out stays out."""

import re

import numpy as np

from models.mini import loose_words, word_forms
from models.mini.captions import canonical, read
from models.mini.paraphrases import CHOICES, TEMPLATES, Paraphrase, _Speaker, complete, paraphrase
from models.mini.world import Attributes, Other, draw

TABLES = ("NOUNS", "SIZES", "COLORS", "MOTIONS", "FLOORS", "LIGHTS", "CAMERAS", "RELATIONS")


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
    for table in TABLES:
        rows = getattr(loose_words, table)
        known = {word for words, _ in rows.values() for word in words}
        kept = {word for _, words in rows.values() for word in words}
        assert not known & kept
        assert len(known) == sum(len(words) for words, _ in rows.values())
    for known_parts, kept_parts in (loose_words.BEATS, loose_words.OPENINGS):
        assert not set(known_parts) & set(kept_parts)


def test_forms_are_of_every_value_and_never_a_held_out_phrase() -> None:
    rng = np.random.default_rng(5)
    for table in TABLES:
        rows, forms = getattr(loose_words, table), getattr(word_forms, table)
        assert set(rows) == set(forms)
        kept = {phrase for _, phrases in rows.values() for phrase in phrases}
        made = {
            word_forms.fill(pattern, rng) for patterns in forms.values() for pattern in patterns for _ in range(300)
        }
        assert not made & kept
        assert not [phrase for phrase in made if re.search(r"[\[\]|]|  ", phrase)]
    # A pattern that can make nothing else but a held-out phrase would never end; one that can, must not make it.
    said = {word_forms.fill("[reddish|crimson]", rng) for _ in range(50)}
    assert said == {"crimson"}


def test_held_out_templates_are_not_met_by_chance() -> None:
    speaker = _Speaker(np.random.default_rng(6), held_out=False)
    templates = {speaker.template() for _ in range(3000)}
    assert len(templates) > 500
    assert not templates & set(TEMPLATES[1])
    assert all(t.index("{thing}") < t.index("{other}") for t in templates)

"""Captions say what is in the clip, and the tokenizer knows their words."""

import numpy as np
import pytest

from models.mini import captions, world

WORLD = world.all_attributes()


@pytest.fixture(scope="module")
def tokenizer():
    return captions.build_tokenizer()


def test_the_canonical_caption_names_every_attribute():
    attributes = world.Attributes("ball", "red", "small", "bouncing", "sand", "sunset")
    assert captions.canonical(attributes) == "a small red ball bouncing on a sand floor at sunset"


def test_the_canonical_caption_tells_of_beats_a_second_object_and_a_camera_that_moves():
    cube = world.Attributes("cube", "blue", "small", "left", "navy", "night", "pan left", then="bouncing")
    assert captions.canonical(cube) == (
        "a small blue cube moving left, then bouncing on a navy floor at night, the camera pans left"
    )
    two = world.Attributes(
        "cone", "cyan", "large", "still", "grey", "noon", other=world.Other("ball", "red", "small", "behind")
    )
    assert captions.canonical(two) == "a large cyan cone standing still behind a small red ball on a grey floor at noon"


def test_canonical_captions_differ_wherever_attributes_do():
    assert len({captions.canonical(a) for a in WORLD}) == len(WORLD)


def test_every_wording_says_colour_shape_and_motion():
    rng = np.random.default_rng(0)
    for _ in range(500):
        attributes = world.draw(rng)
        text = captions.caption(attributes, rng)
        assert any(noun in text for noun in captions.NOUNS[attributes.shape])
        assert any(word in text for word in captions.COLORS.get(attributes.color, (attributes.color,)))
        assert any(words in text for words in captions.MOTIONS[attributes.motion])
        assert attributes.then is None or any(words in text for words in captions.MOTIONS[attributes.then])
        assert attributes.camera == "still" or any(words in text for words in captions.CAMERAS[attributes.camera])
        if other := attributes.other:
            assert any(words in text for words in captions.RELATIONS[other.relation])
            assert any(noun in text for noun in captions.NOUNS[other.shape])


def test_caption_words_are_single_tokens(tokenizer):
    rng = np.random.default_rng(1)
    for _ in range(100):
        text = captions.caption(WORLD[rng.integers(len(WORLD))], rng)
        assert len(tokenizer.encode(text).ids) <= len(text.replace(",", " ,").replace(":", " :").split()) + 1


@pytest.mark.parametrize("text", ["", "Élan vital", "日本語", "\U0001f3ac", "x" * 5000])
def test_any_text_encodes_and_ends_with_the_end_token(tokenizer, text):
    assert tokenizer.encode(text).tokens[-1] == "</s>"


def test_the_tokenizer_is_made_the_same_every_time(tokenizer):
    assert captions.build_tokenizer().to_str() == tokenizer.to_str()

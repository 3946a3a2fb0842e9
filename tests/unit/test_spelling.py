"""Prompts as bags of n-grams: bounded, and close for words that look alike."""

import numpy as np

from models.spelling import MAX_NGRAMS, spell


def bag(word: str) -> set[int]:
    return set(spell(word, 4, 4096)[0].tolist()) - {0}


def test_a_typing_error_keeps_most_of_a_word() -> None:
    assert len(bag("crimson") & bag("crimosn")) > 3
    assert len(bag("crimson") & bag("tripod")) < 2


def test_words_and_their_number_are_bounded() -> None:
    for prompt in ("", " ", "x" * 100_000, "a b " * 1000, "日本語。🎬", "\ud7ff"):
        grams = spell(prompt, 16, 100)
        assert 1 <= len(grams) <= 16
        assert grams.shape[1] == MAX_NGRAMS
        assert grams.dtype == np.int64
        assert grams.min() >= 0
        assert grams.max() <= 100
        assert (grams[:, 0] > 0).all()


def test_case_and_width_do_not_matter() -> None:
    np.testing.assert_array_equal(spell("Red \uff22\uff21\uff2c\uff2c", 8, 99), spell("red  ball", 8, 99))

"""Prompts as bags of letter n-grams: what the rewriter reads instead of tokens.

A word is the sum of its n-grams' embeddings (Bojanowski et al. 2017, arXiv:1607.04606), so that a typing error or an
unknown form of a known word lands near it. Imports no torch: serving and training share this file.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NGRAMS = (3, 4)
# More n-grams than words of some 20 letters have; longer words are cut.
MAX_NGRAMS = 40

_WORD = re.compile(r"\w+|[^\w\s]")


def spell(prompt: str, max_words: int, buckets: int) -> NDArray[np.int64]:
    """`[words, MAX_NGRAMS]` n-gram numbers in 1..`buckets`, padded with zeros; at least one word, at most `max_words`.

    What comes after `max_words` words is not read.
    """
    words = _WORD.findall(unicodedata.normalize("NFKC", prompt).lower())[:max_words] or ["?"]
    grams = np.zeros((len(words), MAX_NGRAMS), np.int64)
    for row, word in zip(grams, words, strict=True):
        numbers = _numbers(word[:64], buckets)
        row[: len(numbers)] = numbers
    return grams


@lru_cache(maxsize=1 << 14)
def _numbers(word: str, buckets: int) -> tuple[int, ...]:
    marked = f"<{word}>"
    grams = [marked, *(marked[at : at + n] for n in NGRAMS for at in range(len(marked) - n + 1))]
    return tuple(1 + zlib.crc32(gram.encode()) % buckets for gram in dict.fromkeys(grams))[:MAX_NGRAMS]

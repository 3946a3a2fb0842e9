"""Speaking a closed vocabulary: a decoder graph, asked for one word after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.bundle import WordsInfo
from serving.engines.engine import Engine

_END = 1


class EngineSpeaker:
    """Greedy decoding: always the likeliest word, so that the same memory gives the same text."""

    def __init__(self, decoder: Engine, info: WordsInfo) -> None:
        self._decoder, self._info = decoder, info

    def speak(self, memory: NDArray[np.float32], memory_mask: NDArray[np.int64], start: int = 0) -> str | None:
        """The text spoken of one row's memory `[1, tokens, width]`; None if it has no end. `start` is any number."""
        words = self._info.words
        ids = np.array([[len(words) + start % self._info.starts]])
        while ids.shape[1] < self._info.max_words:
            feeds = {"ids": ids, "memory": memory, "memory_mask": memory_mask}
            following = int(self._decoder.run(feeds)["logits"][0, -1].argmax())
            if following == _END:
                return " ".join(words[id] for id in ids[0, 1:]).replace(" ,", ",")
            ids = np.append(ids, [[following]], axis=1)
        return None

    def likelihood(
        self, memory: NDArray[np.float32], memory_mask: NDArray[np.int64], text: str, start: int = 0
    ) -> float | None:
        """The mean log-likelihood of `text`'s words and its end; None for a text that can't be spoken."""
        known = {word: id for id, word in enumerate(self._info.words)}
        said = [known.get(word, 0) for word in text.lower().replace(",", " ,").split()]
        if 0 in said or not 0 < len(said) < self._info.max_words:
            return None
        ids = np.array([[len(known) + start % self._info.starts, *said]])
        logits = self._decoder.run({"ids": ids, "memory": memory, "memory_mask": memory_mask})["logits"][0]
        logits = logits - logits.max(axis=1, keepdims=True)
        log_likelihoods = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return float(log_likelihoods[np.arange(len(said) + 1), [*said, _END]].mean())

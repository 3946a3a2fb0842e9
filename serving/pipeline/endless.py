"""A causal video without an end: it goes on for as long as it may, under a prompt that may change at every chunk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models.bundle import Manifest
from serving.engines.engine import Array, Arrays
from serving.pipeline.sessions import CausalSession
from serving.pipeline.stages import DenoiseRequest, LatentChunk, Steering

# Whoever counts the chunks of what has no end gets this.
ENDLESS = 1 << 40


class EndlessSession(CausalSession):
    """As a `CausalSession`, a chunk at a time: `calls` are those up to the end of the chunk that may be made now.

    Its memory is that of the context window, however long it goes on. One that is begun again elsewhere gets what the
    window remembered, and sees it as if nothing had been between the sinks and the rest: for the model, which counts
    positions within the window, that is how it was.
    """

    def __init__(self, manifest: Manifest, request: DenoiseRequest, arrays: Arrays) -> None:
        """Raises `ValueError` when the model isn't causal, or nothing says how the video goes on."""
        if manifest.rollout != "causal" or request.steering is None:
            raise ValueError(f"{request.video_id}: {manifest.name} is {manifest.rollout}, so it can't go on endlessly")
        self._steering = request.steering
        self._prompt = request.steering.number
        self._skipped = request.chunks_before - len(request.begun.chunks)
        super().__init__(manifest, request, arrays)

    @property
    def chunks(self) -> int:
        return ENDLESS

    @property
    def calls(self) -> int:
        if self._step == 0 and self._number(self._chunk) >= self._steering.chunks:
            return self.calls_done
        left = self._calls_before(self._table.steps) - self._calls_before(self._step)
        return self.calls_done + left + 1

    @property
    def rows_left(self) -> int:
        return self._rows_from(self._step) + len(self._texts) if self.calls > self.calls_done else 0

    @property
    def next_chunk(self) -> tuple[int, int]:
        chunk, calls = super().next_chunk
        return self._number(chunk), calls

    @property
    def shape(self) -> tuple[int, int, int, int]:
        channels, _, height, width = self._latent_shape
        return channels, self._chunk_frames, height, width

    def steer(self, steering: Steering) -> None:
        """From the next chunk on: the one that is being made is finished as it was begun."""
        if steering.text is None:
            steering = replace(steering, text=self._steering.text)
        self._steering = steering

    def feeds(self) -> dict[str, Array]:
        if self._step == 0 and self._prompt != self._steering.number:
            steering = self._steering
            self._prompt = steering.number
            if steering.text is not None:
                self._texts[0] = steering.text.hidden_states
                self._text = np.stack(self._texts)
        return super().feeds()

    def _shown(self) -> LatentChunk:
        return replace(super()._shown(), prompt=self._prompt)

    def _number(self, chunk: int) -> int:
        return chunk if chunk < self._window.sink_chunks else chunk + self._skipped

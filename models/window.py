"""The context window of a causal model: which chunks it still remembers when it makes the next one, and where they lie.

A video's first `sink_chunks` chunks, if any, are kept for good (attention rests on them: StreamingLLM, arXiv
2309.17453) and so are the last `window_chunks` before the current one. The cache has one slot for each, so what a chunk
costs does not depend on how long the video already is. Slots behind the sinks are a ring. Positions are counted within
the window, so they do not grow either: the remembered chunks in the order of their age are 0, 1, 2 …, and the current
one is next.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContextWindow:
    """`chunk_frames` is in latent frames; a video's last chunk may have fewer."""

    chunk_frames: int = 3
    sink_chunks: int = 1
    window_chunks: int = 3

    def __post_init__(self) -> None:
        for name, least in (("chunk_frames", 1), ("sink_chunks", 0), ("window_chunks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def capacity(self) -> int:
        """How many chunks the cache holds."""
        return self.sink_chunks + self.window_chunks

    @property
    def cached_frames(self) -> int:
        """How many latent frames the cache holds."""
        return self.capacity * self.chunk_frames

    def slot(self, chunk: int) -> int:
        """The slot that a chunk is written to: behind the sinks, that of the chunk that just left the window."""
        if chunk < self.sink_chunks:
            return chunk
        return self.sink_chunks + (chunk - self.sink_chunks) % self.window_chunks

    def frames_of(self, chunk: int) -> slice:
        """Where a whole chunk lies among the `cached_frames`."""
        start = self.slot(chunk) * self.chunk_frames
        return slice(start, start + self.chunk_frames)

    def remembered(self, chunk: int) -> list[int]:
        """The chunks that `chunk` sees beside itself, by position."""
        recent = range(max(self.sink_chunks, chunk - self.window_chunks), chunk)
        return [*range(min(self.sink_chunks, chunk)), *recent]

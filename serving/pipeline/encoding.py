"""Frames to latents: what a caption is read from, and what a video begins with that continues or changes another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, Manifest
from serving.engines.engine import Engine
from serving.engines.onnx_runtime import CPU
from serving.engines.opening import NATIVE, Opener


class EngineEncoder:
    """The VAE's encoder, with its cache kept from group to group of frames."""

    def __init__(self, first: Engine, following: Engine, manifest: Manifest) -> None:
        self._first, self._following = first, following
        self._group = manifest.latent.temporal
        self._cell = manifest.latent.spatial * manifest.latent.patch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="frames")

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 1, provider: str = CPU) -> EngineEncoder | None:
        """None when the bundle can't encode. It has no plans: where others have, it is on the CPU."""
        if not bundle.manifest.encodes:
            return None
        opener = Opener(bundle, threads, CPU if provider in NATIVE else provider)
        first, following = opener.open("encoder_first", "encoder_next")
        return cls(first, following, bundle.manifest)

    def encode(self, frames: Iterable[NDArray[np.uint8]], max_latent_frames: int) -> NDArray[np.float32]:
        """Normalised latents `[channels, n, height, width]` of frames `[height, width, 3]`.

        Takes no more frames than `max_latent_frames` need, and leaves out an incomplete last group. There must be a
        frame. Its sides are filled up to what the denoiser can patch.
        """
        waiting = (self._filled(frame) for frame in frames)
        outputs = self._first.run({"frames": next(waiting)[None, None]})
        latents = [outputs.pop("latents")]
        cache = outputs
        while len(latents) < max_latent_frames and len(group := list(islice(waiting, self._group))) == self._group:
            outputs = self._following.run({"frames": np.stack(group)[None], **cache})
            latents.append(outputs.pop("latents"))
            cache = {name.removeprefix("next_"): value for name, value in outputs.items()}
        encoded: NDArray[np.float32] = np.concatenate(latents, axis=2)[0]
        return encoded

    async def encode_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """As `FrameEncoder` says."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.encode, frames, len(frames))

    async def stop(self) -> None:
        """Wait for the call that is running."""
        await asyncio.to_thread(self._thread.shutdown)

    def _filled(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        missing = [(0, -side % self._cell) for side in frame.shape[:2]]
        return np.pad(frame, (*missing, (0, 0)), mode="edge") if any(after for _, after in missing) else frame

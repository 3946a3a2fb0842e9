"""Frames to latents: what a caption is read from, and what a video begins with that continues or changes another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, GraphName, Manifest
from models.pictures import looked_at, with_grey
from serving.engines.engine import Engine
from serving.engines.onnx_runtime import CPU
from serving.engines.opening import NATIVE, Opener
from serving.pipeline.stages import EncodedSource


class EngineEncoder:
    """The VAE's encoder, with its cache kept from group to group of frames."""

    def __init__(self, first: Engine, following: Engine, manifest: Manifest, image: Engine | None = None) -> None:
        """`image` is the engine of `image_encoder`, for a manifest with `image`."""
        self._first, self._following, self._image = first, following, image
        self._manifest = manifest
        # Float32, and in bundles of before uint8.
        self._dtype = first.inputs["frames"][0]
        self._group = manifest.latent.temporal
        self._cell = manifest.latent.spatial * manifest.latent.patch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="frames")

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 1, provider: str = CPU) -> EngineEncoder | None:
        """None when the bundle can't encode. It has no plans: where others have, it is on the CPU."""
        if not bundle.manifest.encodes:
            return None
        graphs: list[GraphName] = ["encoder_first", "encoder_next"]
        if bundle.manifest.image is not None:
            graphs.append("image_encoder")
        first, following, *image = Opener(bundle, threads, CPU if provider in NATIVE else provider).open(*graphs)
        return cls(first, following, bundle.manifest, image[0] if image else None)

    def encode(self, frames: Iterable[NDArray[Any]], max_latent_frames: int) -> NDArray[np.float32]:
        """Normalised latents `[channels, n, height, width]` of frames `[height, width, 3]`, 0 to 255.

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
        """Normalised latents of frames `[frames, height, width, 3]`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.encode, frames, len(frames))

    async def encode_source(self, frames: NDArray[np.uint8], video_frames: int) -> EncodedSource:
        """As `FrameEncoder` says. Raises `ValueError` for more than a picture where the model takes no more."""
        if not self._manifest.pictured:
            return EncodedSource(await self.encode_frames(frames))
        if len(frames) != 1:
            raise ValueError(f"{self._manifest.name} makes a video of one picture, not of {len(frames)} frames")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._pictured, frames[0], video_frames)

    def _pictured(self, picture: NDArray[np.uint8], video_frames: int) -> EncodedSource:
        latents = self.encode(with_grey(picture, video_frames), video_frames)
        if self._image is None or self._manifest.image is None:
            return EncodedSource(latents)
        pixels = looked_at(picture, self._manifest.image.side)[None]
        return EncodedSource(latents, self._image.run({"pixels": pixels})["image_hidden_states"][0])

    async def stop(self) -> None:
        """Wait for the call that is running."""
        await asyncio.to_thread(self._thread.shutdown)

    def _filled(self, frame: NDArray[Any]) -> NDArray[Any]:
        missing = [(0, -side % self._cell) for side in frame.shape[:2]]
        frame = frame.astype(self._dtype, copy=False)
        return np.pad(frame, (*missing, (0, 0)), mode="edge") if any(after for _, after in missing) else frame

"""What a video begins from: another video, an upload or a picture, kept beside the new one before it is queued."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile

from models.bundle import Manifest
from serving.api.auth import may_see
from serving.api.errors import ApiError
from serving.api.fetching import FetchError, fetch
from serving.jobs.artifacts import video_key
from serving.jobs.files import CHARACTER, StoredFile, is_character_id, is_file_id
from serving.jobs.storage import Storage
from serving.jobs.video import Video
from serving.media.frames import UnreadableError, middle_frame, read_frames, write_exactly
from serving.pipeline.pricing import work_of
from serving.pipeline.stages import VideoSpec

# How far a remix or an edit goes when the request doesn't say: far enough to change a colour.
DEFAULT_STRENGTH = 0.75
_PICTURE = "input_reference"
_CHARACTERS = "characters"
# Of a character's picture: what a video's frames are cut from may be larger than any of them.
_CHARACTER_SECONDS, _CHARACTER_SIDE = 20.0, 1024


@dataclass(frozen=True, slots=True)
class ReferencePolicy:
    """How large an upload or a fetched picture may be, and whether one may come from a private address."""

    max_bytes: int = 32 << 20
    allow_private: bool = False

    @property
    def max_body_bytes(self) -> int:
        """Of a body with such a file in it, as base64."""
        return self.max_bytes * 4 // 3 + 1024


DEFAULT_REFERENCES = ReferencePolicy()


class Beginnings:
    """Each method returns the video as it is to be queued and the hash of what it begins from, which is kept then.

    Whoever doesn't queue it must `discard` it.
    """

    def __init__(self, storage: Storage, policy: ReferencePolicy) -> None:
        self._files, self._artifacts = storage.files, storage.artifacts
        self._policy = policy

    async def from_picture(
        self, video: Video, manifest: Manifest, reference: Any, owner: str | None
    ) -> tuple[Video, str]:
        """`reference` is an upload, or an object with `file_id` or `image_url`. Raises `ApiError`."""
        check_encodes(manifest, _PICTURE)
        with self._artifacts.scratch() as given:
            await self._get(reference, given, owner)
            return await self._pictured(video, manifest, given, _PICTURE)

    async def from_character(
        self, video: Video, manifest: Manifest, asked: Any, owner: str | None
    ) -> tuple[Video, str]:
        """`asked` is a list of one object with the `id` of a character. Raises `ApiError`."""
        check_encodes(manifest, _CHARACTERS)
        character = await self.character(_only_id(asked), owner, _CHARACTERS)
        with self._artifacts.scratch() as given:
            await asyncio.to_thread(self._artifacts.fetch, character.key, given)
            return await self._pictured(video, manifest, given, _CHARACTERS)

    async def character(self, character_id: str, owner: str | None, param: str) -> StoredFile:
        """Raises `ApiError` (404)."""
        found = await self._files.get(character_id) if is_character_id(character_id) else None
        if found is None or not may_see(owner, found.owner):
            message = f"There is no character {character_id[:64]!r}."
            raise ApiError(404, message, param=param, code="character_not_found")
        return found

    async def keep_character(self, upload: UploadFile, name: str, owner: str | None) -> StoredFile:
        """Keep the picture in the middle of a video until somebody deletes it. Raises `ApiError`."""
        with self._artifacts.scratch() as given, self._artifacts.scratch() as kept:
            await asyncio.to_thread(_save, upload, given, self._policy.max_bytes, "video")

            def write() -> int:
                picture = middle_frame(given, max_seconds=_CHARACTER_SECONDS, max_side=_CHARACTER_SIDE)
                return write_exactly(kept, iter([picture]), 1)

            await _written(write, "video")
            return await self._files.add(
                kept, owner=owner, purpose="character", filename=name, lifetime_seconds=None, kind=CHARACTER
            )

    async def _pictured(self, video: Video, manifest: Manifest, given: Path, param: str) -> tuple[Video, str]:
        """`video` as it begins with the one picture that `given` must be."""
        spec = VideoSpec(**video.request)
        with self._artifacts.scratch() as kept:

            def write() -> int:
                frames = read_frames(given, fps=manifest.fps, width=spec.width, height=spec.height)
                return write_exactly(kept, islice(frames, 2), manifest.fps)

            if await _written(write, param) > 1:
                message = f"{param} must be a picture; a video can be sent to /v1/videos/edits or /extensions."
                raise ApiError(400, message, param=param, code="invalid_value")
            return await self._keep(video, manifest, spec, kept, source_frames=1)

    async def from_video(
        self, video: Video, manifest: Manifest, source: Video, *, strength: float | None, more_seconds: int = 0
    ) -> tuple[Video, str]:
        """Of a completed video of the same model: a draft, or with `more_seconds` its continuation."""
        spec = replace(VideoSpec(**video.request), source_video_id=source.id)
        frames = int(source.request["frames"])
        spec = replace(spec, frames=_length(manifest, frames, more_seconds))
        with self._artifacts.scratch() as kept:
            await asyncio.to_thread(self._artifacts.fetch, video_key(source.id, "video.mp4"), kept)
            return await self._keep(video, manifest, spec, kept, source_frames=frames, strength=strength)

    async def from_upload(
        self, video: Video, manifest: Manifest, upload: UploadFile, *, strength: float | None, more_seconds: int = 0
    ) -> tuple[Video, str]:
        """As `from_video`; what is longer than the model's limit is cut off. Raises `ApiError`."""
        spec = VideoSpec(**video.request)
        latent, longest = manifest.latent, 1 + manifest.fps * manifest.limits.max_seconds
        with self._artifacts.scratch() as given, self._artifacts.scratch() as kept:
            await asyncio.to_thread(_save, upload, given, self._policy.max_bytes, "video")

            def write() -> int:
                frames = read_frames(given, fps=manifest.fps, width=spec.width, height=spec.height)
                return write_exactly(kept, islice(frames, longest), manifest.fps)

            count = await _written(write, "video")
            # Whole groups, as the VAE sees them.
            frames = 1 + (count - 1) // latent.temporal * latent.temporal
            if frames == 1:
                message = f"video must have at least {1 + latent.temporal} frames at {manifest.fps} a second."
                raise ApiError(400, message, param="video", code="invalid_value")
            spec = replace(spec, frames=_length(manifest, frames, more_seconds))
            return await self._keep(video, manifest, spec, kept, source_frames=frames, strength=strength)

    async def discard(self, video: Video) -> None:
        await asyncio.to_thread(self._artifacts.remove_video, video.id)

    async def _keep(
        self,
        video: Video,
        manifest: Manifest,
        spec: VideoSpec,
        path: Path,
        *,
        source_frames: int,
        strength: float | None = None,
    ) -> tuple[Video, str]:
        key = video_key(video.id, "source")
        artifact = await asyncio.to_thread(self._artifacts.put, key, path)
        spec = replace(spec, source=key, source_frames=source_frames, strength=strength)
        length = str((spec.frames - 1) // manifest.fps)
        return replace(video, request=asdict(spec), seconds=length, work=work_of(manifest, spec)), artifact.sha256

    async def _get(self, reference: Any, target: Path, owner: str | None) -> None:
        """Write the bytes that an `input_reference` stands for."""
        limit = self._policy.max_bytes
        if isinstance(reference, UploadFile):
            await asyncio.to_thread(_save, reference, target, limit, _PICTURE)
            return
        reference = as_object(reference, _PICTURE)
        if len(reference) != 1 or not reference.keys() <= {"file_id", "image_url"}:
            message = "input_reference must be an upload or an object with either file_id or image_url."
            raise ApiError(400, message, param=_PICTURE, code="invalid_value")
        ((name, value),) = reference.items()
        if not isinstance(value, str):
            raise ApiError(400, f"{_PICTURE}.{name} must be a string.", param=_PICTURE, code="invalid_value")
        if name == "file_id":
            file = await self._files.get(value) if is_file_id(value) else None
            if file is None or not may_see(owner, file.owner):
                raise ApiError(404, f"There is no file {value[:64]!r}.", param=_PICTURE, code="file_not_found")
            if file.size_bytes > limit:
                raise _too_large(_PICTURE, limit)
            await asyncio.to_thread(self._artifacts.fetch, file.key, target)
            return
        try:
            await fetch(value, target, max_bytes=limit, allow_private=self._policy.allow_private)
        except FetchError as error:
            message = f"{_PICTURE}.{name} can't be used: {error}."
            raise ApiError(400, message, param=_PICTURE, code="invalid_value") from None


def check_encodes(manifest: Manifest, param: str) -> None:
    """Raises `ApiError` for a model that can't begin from anything but noise."""
    if not manifest.encodes:
        message = f"{param} is not supported by this model: it has no encoder for frames."
        raise ApiError(400, message, param=param, code="unsupported_by_model")


def check_goes_on(manifest: Manifest, param: str) -> None:
    """Raises `ApiError` for a model that can't begin from a video."""
    check_encodes(manifest, param)
    if manifest.pictured:
        message = f"{param} is not supported by this model: it makes videos of one picture (input_reference)."
        raise ApiError(400, message, param=param, code="unsupported_by_model")


def as_object(value: Any, param: str) -> dict[str, Any]:
    """A JSON object, which in a form may be text. Raises `ApiError`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise ApiError(400, f"{param} must be an upload or an object.", param=param, code="invalid_value")
    return value


def _only_id(asked: Any) -> str:
    """Of a request's `characters`, which in a form may be text."""
    if isinstance(asked, str):
        try:
            asked = json.loads(asked)
        except (ValueError, RecursionError):
            asked = None
    if (
        not isinstance(asked, list)
        or not asked
        or not all(isinstance(one, dict) and one.keys() == {"id"} for one in asked)
    ):
        message = "characters must be a list of objects with an id."
        raise ApiError(400, message, param=_CHARACTERS, code="invalid_value")
    if len(asked) > 1:
        message = "characters must have one entry: no model here can show several."
        raise ApiError(400, message, param=_CHARACTERS, code="unsupported_by_model")
    if not isinstance(asked[0]["id"], str):
        raise ApiError(400, "characters[0].id must be a string.", param=_CHARACTERS, code="invalid_value")
    return asked[0]["id"]


def _length(manifest: Manifest, frames: int, more_seconds: int) -> int:
    """How many frames the new video has. Raises `ApiError` when they are too many."""
    longest = manifest.limits.max_seconds
    total = frames + manifest.fps * more_seconds
    if total > 1 + manifest.fps * longest:
        had = (frames - 1) / manifest.fps
        message = f"seconds must leave the video at {longest} seconds at most; it has {had:g} already."
        raise ApiError(400, message, param="seconds", code="invalid_value")
    return total


def _save(upload: UploadFile, target: Path, max_bytes: int, param: str) -> None:
    if upload.size is not None and upload.size > max_bytes:
        raise _too_large(param, max_bytes)
    with target.open("wb") as file:
        shutil.copyfileobj(upload.file, file)


def _too_large(param: str, max_bytes: int) -> ApiError:
    return ApiError(413, f"{param} has more than {max_bytes} bytes.", param=param, code="file_too_large")


async def _written(write: Callable[[], int], param: str) -> int:
    try:
        return await asyncio.to_thread(write)
    except UnreadableError as error:
        raise ApiError(400, f"{param} can't be used: {error}.", param=param, code="invalid_value") from None

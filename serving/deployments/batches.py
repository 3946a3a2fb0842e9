"""Takes batches from a file of requests to a file of answers, a step at a time; any number of these may run. No Ray."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from serving.api.creation import NO_WEBHOOKS, WebhookPolicy, new_video
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.schemas import parse_create, video_object
from serving.jobs.batches import Batch, BatchStatus
from serving.jobs.files import LONGEST_LIFETIME_SECONDS, StoredFile
from serving.jobs.storage import Storage
from serving.jobs.store import Video, VideoNotFound, VideoStatus
from serving.jobs.video import BATCH

_log = logging.getLogger(__name__)

MAX_LINES = 50_000
_MAX_LINE_BYTES = 1 << 18
_MAX_ERRORS = 100
_AT_A_TIME = 500


class LineError(ValueError):
    """A line that can't be made a video of."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


class BatchWorker:
    """Looks for batches with something to do. What it is in the middle of when it dies, the next one does again."""

    def __init__(self, storage: Storage, catalog: Catalog, webhooks: WebhookPolicy = NO_WEBHOOKS) -> None:
        self._batches, self._files = storage.batches, storage.files
        self._videos, self._artifacts = storage.videos, storage.artifacts
        self._catalog, self._webhooks = catalog, webhooks

    async def run(self, poll_seconds: float) -> None:
        """Work until this is cancelled."""
        while True:
            try:
                worked = await self.work(look_again_seconds=poll_seconds)
            except Exception:  # the batch comes back when its lease is over
                _log.warning("a batch could not be taken further", exc_info=True)
                worked = False
            if not worked:
                await asyncio.sleep(poll_seconds)

    async def work(self, look_again_seconds: float = 0.0) -> bool:
        """Take one batch as far as it goes now; whether there was one."""
        batch = await self._batches.claim()
        if batch is None:
            return False
        await self._advance(batch)
        await self._batches.put_back(batch.id, look_again_seconds)
        return True

    async def _advance(self, batch: Batch) -> None:
        now = self._batches.clock()
        if batch.status is BatchStatus.VALIDATING:
            await self._begin(batch)
        elif batch.status is BatchStatus.FINALIZING:
            await self._finish(batch)
        else:
            if batch.status is BatchStatus.IN_PROGRESS and batch.expired_at is None and now >= batch.expires_at:
                await self._batches.change(batch.id, (BatchStatus.IN_PROGRESS,), expired_at=now)
                batch = replace(batch, expired_at=now)
            if batch.expired_at is not None or batch.cancelling_at is not None:
                await self._cancel_videos(batch)
                batch = await self._batches.get(batch.id) or batch
            if batch.completed + batch.failed >= batch.total:
                counts = {"completed": batch.completed, "failed": batch.failed}
                unfinished = (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING)
                ending = {"status": BatchStatus.FINALIZING, "finalizing_at": now} | counts
                changed = await self._batches.change(batch.id, unfinished, **ending)
                if changed is not None:
                    await self._finish(changed)

    async def _begin(self, batch: Batch) -> None:
        """Check the whole file, then put every line into the queue; the lines count only once all are there."""
        now = self._batches.clock()
        file = await self._files.get(batch.input_file_id)
        if file is None:
            errors = [_error(LineError("file_not_found", "The input file is gone."), None)]
            total = 0
        else:
            errors, total = await asyncio.to_thread(self._check, batch, file)
        if errors:
            failed = {"status": BatchStatus.FAILED, "failed_at": now, "errors": errors}
            await self._batches.change(batch.id, (BatchStatus.VALIDATING,), **failed)
            return
        assert file is not None
        await asyncio.to_thread(self._queue, batch, file)
        begun = {"status": BatchStatus.IN_PROGRESS, "in_progress_at": now, "total": total}
        if await self._batches.change(batch.id, (BatchStatus.VALIDATING,), **begun) is None:
            # Cancelled while its lines went into the queue.
            await self._batches.change(batch.id, (BatchStatus.CANCELLING,), total=total)

    def _check(self, batch: Batch, file: StoredFile) -> tuple[list[dict[str, Any]], int]:
        """What is wrong with which line, and how many lines there are."""
        errors: list[dict[str, Any]] = []
        seen: set[str] = set()
        total = 0
        for line, text in self._lines(file):
            total += 1
            if total % _AT_A_TIME == 0:
                self._batches.keep(batch.id)
            if total > MAX_LINES:
                return [_error(LineError("too_many_lines", f"At most {MAX_LINES} lines are allowed."), line)], total
            try:
                video = self._video(batch, line, text)
                if str(video.custom_id) in seen:
                    raise LineError("duplicate_custom_id", "The custom_id was used before.", "custom_id")
                seen.add(str(video.custom_id))
            except LineError as error:
                errors.append(_error(error, line))
                if len(errors) == _MAX_ERRORS:
                    break
        if total == 0:
            errors.append(_error(LineError("empty_file", "The input file has no requests."), None))
        return errors, total

    def _queue(self, batch: Batch, file: StoredFile) -> None:
        pending: list[Video] = []
        for line, text in self._lines(file):
            pending.append(self._video(batch, line, text))
            if len(pending) == _AT_A_TIME:
                self._batches.add_videos(pending)
                self._batches.keep(batch.id)
                pending = []
        self._batches.add_videos(pending)

    def _lines(self, file: StoredFile) -> Iterator[tuple[int, bytes]]:
        """Number, from 1, and text of each line that isn't empty."""
        with self._artifacts.lines(file.key) as lines:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    yield number, text

    def _video(self, batch: Batch, line: int, text: bytes) -> Video:
        request = _parsed(text)
        unknown = request.keys() - {"custom_id", "method", "url", "body"}
        if unknown:
            name = sorted(unknown)[0][:64]
            raise LineError("unknown_parameter", f"Unknown parameter: {name}.", name)
        custom_id = request.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512 or "\0" in custom_id:
            raise LineError("invalid_value", "custom_id must be a string of 1 to 512 characters.", "custom_id")
        if request.get("method") != "POST":
            raise LineError("invalid_value", "method must be 'POST'.", "method")
        if request.get("url") != batch.endpoint:
            raise LineError("invalid_value", f"url must be the batch's endpoint, {batch.endpoint!r}.", "url")
        try:
            asked = request.get("body")
            if isinstance(asked, dict) and "input_reference" in asked:
                raise LineError("invalid_value", "input_reference can't be used in a batch.", "body.input_reference")
            body = parse_create(asked, form=False)
            if body.stream:
                raise LineError("invalid_value", "stream can't be used in a batch.", "body.stream")
            video = new_video(body, self._catalog, self._webhooks, owner=batch.owner, priority=BATCH)
        except ApiError as error:
            param = "body" if error.param is None else f"body.{error.param}"
            raise LineError(error.code or "invalid_value", error.message, param) from None
        return replace(video, batch_id=batch.id, batch_line=line, custom_id=custom_id)

    async def _cancel_videos(self, batch: Batch) -> None:
        while pending := await self._batches.pending(batch.id, _AT_A_TIME):
            for video_id in pending:
                try:
                    await self._videos.request_cancel(video_id)
                except VideoNotFound:  # deleted meanwhile
                    continue
            await asyncio.to_thread(self._batches.keep, batch.id)

    async def _finish(self, batch: Batch) -> None:
        """Write what became of every line, and only then say that it is done."""
        now = self._batches.clock()
        files: dict[str, str | None] = {"output_file_id": None, "error_file_id": None}
        made: list[StoredFile] = []
        with self._artifacts.scratch() as good, self._artifacts.scratch() as bad:
            wrote = await self._write_results(batch, good, bad)
            for key, path, count in (("output_file_id", good, wrote[0]), ("error_file_id", bad, wrote[1])):
                if count:
                    name = f"{batch.id}_{key.removesuffix('_file_id')}.jsonl"
                    file = await self._files.add(
                        path,
                        owner=batch.owner,
                        purpose="batch_output",
                        filename=name,
                        lifetime_seconds=batch.output_lifetime_seconds or LONGEST_LIFETIME_SECONDS,
                    )
                    files[key] = file.id
                    made.append(file)
        if batch.cancelling_at is not None:
            status = BatchStatus.CANCELLED
        else:
            status = BatchStatus.COMPLETED if batch.expired_at is None else BatchStatus.EXPIRED
        ended = {"status": status, f"{status.value}_at": batch.expired_at or now} | files
        if await self._batches.change(batch.id, (BatchStatus.FINALIZING,), **ended) is None:
            for file in made:  # another worker was quicker
                await self._files.remove(file)

    async def _write_results(self, batch: Batch, good: Any, bad: Any) -> tuple[int, int]:
        """How many lines went into each file."""
        counts = [0, 0]
        line = 0
        with good.open("w", encoding="utf-8") as output, bad.open("w", encoding="utf-8") as errors:
            while videos := await self._batches.videos(batch.id, line, _AT_A_TIME):
                for video in videos:
                    done = video.status is VideoStatus.COMPLETED
                    counts[0 if done else 1] += 1
                    (output if done else errors).write(json.dumps(_result(batch, video)) + "\n")
                line = videos[-1].batch_line or 0
                await asyncio.to_thread(self._batches.keep, batch.id)
        return counts[0], counts[1]


def _parsed(text: bytes) -> dict[str, Any]:
    if len(text) > _MAX_LINE_BYTES:
        raise LineError("line_too_long", f"A line may have {_MAX_LINE_BYTES} bytes.")
    try:
        request = json.loads(text)
    except (ValueError, RecursionError):
        raise LineError("invalid_json_line", "The line is not valid JSON.") from None
    if not isinstance(request, dict):
        raise LineError("invalid_json_line", "The line is not a JSON object.")
    return request


def _error(error: LineError, line: int | None) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "param": error.param, "line": line}


def _result(batch: Batch, video: Video) -> dict[str, Any]:
    identity = video.id.removeprefix("video_")
    result: dict[str, Any] = {"id": f"batch_req_{identity}", "custom_id": video.custom_id}
    if video.status is VideoStatus.COMPLETED:
        body = video_object(video).model_dump(mode="json")
        return result | {"response": {"status_code": 200, "request_id": f"req_{identity}", "body": body}, "error": None}
    code, message = video.error_code or "failed", video.error_message or ""
    if code == "cancelled" and batch.expired_at is not None:
        code, message = "batch_expired", "The batch's completion window was over."
    return result | {"response": None, "error": {"code": code, "message": message}}

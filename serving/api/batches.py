"""`/v1/batches`: many videos for one file of requests, when there is time."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request

from serving.api.auth import Owner, may_see
from serving.api.batch_schemas import BatchList, BatchObject, CreateBatchRequest, batch_object, parse_batch
from serving.api.body import opened_body
from serving.api.creation import WebhookPolicy
from serving.api.document import id_pattern, json_document
from serving.api.errors import ApiError
from serving.jobs.batches import Batch, BatchStatus, is_batch_id, new_batch_id
from serving.jobs.files import is_file_id
from serving.jobs.storage import Storage

_LONGEST_WINDOW_HOURS = 168


def batches_router(storage: Storage, webhooks: WebhookPolicy) -> APIRouter:
    router = APIRouter(prefix="/v1/batches", tags=["batches"])
    batches, files = storage.batches, storage.files

    async def existing(batch_id: str, owner: str | None) -> Batch:
        batch = await batches.get(batch_id) if is_batch_id(batch_id) else None
        if batch is None or not may_see(owner, batch.owner):
            raise ApiError(404, f"There is no batch {batch_id[:64]!r}.", param="batch_id", code="batch_not_found")
        return batch

    @router.post("", openapi_extra=json_document(CreateBatchRequest, webhooks=webhooks.enabled))
    async def create_batch(request: Request, owner: Owner) -> BatchObject:
        async with opened_body(request) as (values, _):
            body = parse_batch(values)
        window_seconds = _window(body.completion_window)
        file = await files.get(body.input_file_id) if is_file_id(body.input_file_id) else None
        if file is None or file.purpose != "batch" or not may_see(owner, file.owner):
            message = f"There is no file {body.input_file_id[:64]!r} with purpose 'batch'."
            raise ApiError(404, message, param="input_file_id", code="file_not_found")
        now = batches.clock()
        batch = Batch(
            id=new_batch_id(),
            owner=owner,
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + window_seconds,
            custom=body.metadata,
            output_lifetime_seconds=body.output_expires_after.seconds if body.output_expires_after else None,
            webhook_url=webhooks.checked(body.webhook_url),
        )
        return batch_object(await batches.create(batch))

    @router.get("")
    async def list_batches(
        owner: Owner,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(json_schema_extra={"pattern": id_pattern("batch_")})] = None,
    ) -> BatchList:
        if after is not None and not is_batch_id(after):
            raise ApiError(400, "after must be a batch's id.", param="after", code="invalid_value")
        found, has_more = await batches.list(owner=owner, limit=limit, order=order, after=after)
        return BatchList(
            data=[batch_object(batch) for batch in found],
            first_id=found[0].id if found else None,
            last_id=found[-1].id if found else None,
            has_more=has_more,
        )

    @router.get("/{batch_id}")
    async def retrieve_batch(batch_id: str, owner: Owner) -> BatchObject:
        return batch_object(await existing(batch_id, owner))

    @router.post("/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, owner: Owner) -> BatchObject:
        await existing(batch_id, owner)
        running = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)
        changes = {"status": BatchStatus.CANCELLING, "cancelling_at": batches.clock()}
        await batches.change(batch_id, running, **changes)
        batch = await existing(batch_id, owner)
        if batch.cancelling_at is None:
            message = f"The batch is {batch.status.value} and can't be cancelled."
            raise ApiError(409, message, param="batch_id", code="batch_has_ended")
        return batch_object(batch)

    return router


def _window(text: str) -> float:
    """Seconds. OpenAI takes 24h alone; other whole hours do here too."""
    match = re.fullmatch(r"([0-9]{1,3})h", text)
    if match is None or not 1 <= int(match[1]) <= _LONGEST_WINDOW_HOURS:
        message = f"completion_window must be whole hours from 1h to {_LONGEST_WINDOW_HOURS}h, such as 24h."
        raise ApiError(400, message, param="completion_window", code="invalid_value")
    return 3600.0 * int(match[1])

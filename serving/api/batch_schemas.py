"""What goes over the wire for files and batches: OpenAI's objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serving.api.errors import ApiError
from serving.api.schemas import named_error, whole_seconds
from serving.jobs.batches import Batch
from serving.jobs.files import LONGEST_LIFETIME_SECONDS, StoredFile


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_object(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.size_bytes,
        created_at=int(file.created_at),
        expires_at=whole_seconds(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
    )


class ExpiresAfter(BaseModel):
    """How long a file is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=LONGEST_LIFETIME_SECONDS)


class CreateBatchRequest(BaseModel):
    """The body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    input_file_id: str = Field(description="A file with purpose `batch`: a JSON object a line.")
    endpoint: Literal["/v1/videos"] = Field(description="What each line is a request to.")
    completion_window: str = Field(
        description="`24h`: what isn't made by then is not made.",
        json_schema_extra={"pattern": "^([1-9]|[1-9][0-9]|1[0-5][0-9]|16[0-8])h$"},
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16, description="Anything of yours, kept with the batch."
    )
    output_expires_after: ExpiresAfter | None = Field(
        default=None, description="How long the files of answers are kept; 30 days when it is left out."
    )
    webhook_url: str | None = Field(
        default=None, description="What to call when the batch has ended, with a signed event."
    )

    @field_validator("metadata")
    @classmethod
    def _without_nul(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if any("\0" in key + value for key, value in (metadata or {}).items()):
            raise ValueError("it must not contain a NUL character")
        return metadata


def parse_batch(values: Any) -> CreateBatchRequest:
    """Raises `ApiError` (400), which names the field."""
    if not isinstance(values, Mapping):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_type")
    try:
        return CreateBatchRequest.model_validate(values)
    except ValidationError as error:
        raise named_error(error.errors(include_url=False)) from None


class BatchCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_object(batch: Batch) -> BatchObject:
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=BatchErrors(data=[dict(error) for error in batch.errors]) if batch.errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status.value,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at),
        in_progress_at=whole_seconds(batch.in_progress_at),
        expires_at=int(batch.expires_at),
        finalizing_at=whole_seconds(batch.finalizing_at),
        completed_at=whole_seconds(batch.completed_at),
        failed_at=whole_seconds(batch.failed_at),
        expired_at=whole_seconds(batch.expired_at),
        cancelling_at=whole_seconds(batch.cancelling_at),
        cancelled_at=whole_seconds(batch.cancelled_at),
        request_counts=BatchCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        metadata=None if batch.custom is None else dict(batch.custom),
    )

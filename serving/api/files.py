"""`/v1/files`: what batches are made of and what they answer with, and pictures that videos begin from."""

from __future__ import annotations

import asyncio
import re
import shutil
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from serving.api.auth import Owner, may_see
from serving.api.batch_schemas import DeletedFile, FileList, FileObject, file_object
from serving.api.content import file_response
from serving.api.document import id_pattern
from serving.api.errors import ApiError
from serving.jobs.files import LONGEST_LIFETIME_SECONDS, StoredFile, is_file_id
from serving.jobs.storage import Storage

PATH = "/v1/files"
# `vision` and `user_data` are what OpenAI's clients upload pictures as.
_PURPOSES = ("batch", "vision", "user_data")
_FIELDS = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
_UPLOAD_DOCUMENT = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(_PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3600,
                            "maximum": LONGEST_LIFETIME_SECONDS,
                        },
                    },
                    "dependentRequired": {
                        "expires_after[anchor]": ["expires_after[seconds]"],
                        "expires_after[seconds]": ["expires_after[anchor]"],
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}


def files_router(storage: Storage) -> APIRouter:
    router = APIRouter(prefix=PATH, tags=["files"])
    files, artifacts = storage.files, storage.artifacts

    async def existing(file_id: str, owner: str | None) -> StoredFile:
        file = await files.get(file_id) if is_file_id(file_id) else None
        if file is None or not may_see(owner, file.owner):
            raise ApiError(404, f"There is no file {file_id[:64]!r}.", param="file_id", code="file_not_found")
        return file

    @router.post("", openapi_extra=_UPLOAD_DOCUMENT)
    async def upload_file(request: Request, owner: Owner) -> FileObject:
        try:
            # Beyond a megabyte, the upload goes to a file on the disk as it comes.
            async with request.form(max_files=1, max_fields=len(_FIELDS)) as form:
                upload, purpose, lifetime_seconds = _checked(form)
                with artifacts.scratch() as path:
                    with path.open("wb") as target:
                        await asyncio.to_thread(shutil.copyfileobj, upload.file, target)
                    name = re.sub(r"[\x00-\x1f\x7f]", "", upload.filename or "")[-255:] or "upload"
                    stored = await files.add(
                        path, owner=owner, purpose=purpose, filename=name, lifetime_seconds=lifetime_seconds
                    )
        except HTTPException as error:
            raise ApiError(400, f"The form can't be read: {error.detail}", code="invalid_form") from None
        return file_object(stored)

    @router.get("")
    async def list_files(
        owner: Owner,
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(json_schema_extra={"pattern": id_pattern("file-")})] = None,
    ) -> FileList:
        if after is not None and not is_file_id(after):
            raise ApiError(400, "after must be a file's id.", param="after", code="invalid_value")
        found, has_more = await files.list(owner=owner, purpose=purpose, limit=limit, order=order, after=after)
        return FileList(
            data=[file_object(file) for file in found],
            first_id=found[0].id if found else None,
            last_id=found[-1].id if found else None,
            has_more=has_more,
        )

    @router.get("/{file_id}")
    async def retrieve_file(file_id: str, owner: Owner) -> FileObject:
        return file_object(await existing(file_id, owner))

    @router.delete("/{file_id}")
    async def delete_file(file_id: str, owner: Owner) -> DeletedFile:
        await files.remove(await existing(file_id, owner))
        return DeletedFile(id=file_id)

    @router.get("/{file_id}/content", response_class=Response)
    async def download_file(request: Request, file_id: str, owner: Owner) -> Response:
        file = await existing(file_id, owner)
        known = {"size_bytes": file.size_bytes, "sha256": file.sha256}
        return file_response(
            request,
            artifacts,
            file.key,
            known,
            kind="application/octet-stream",
            name=f"{file.id}{_suffix(file)}",
            made=file.created_at,
        )

    return router


def _suffix(file: StoredFile) -> str:
    """What a download's name ends with: the upload's own ending, if it is a plain one."""
    if file.purpose.startswith("batch"):
        return ".jsonl"
    found = re.search(r"\.[A-Za-z0-9]{1,8}\Z", file.filename)
    return found[0] if found else ""


def _checked(form: FormData) -> tuple[UploadFile, str, float]:
    """The upload, its purpose, and how many seconds it is kept. Raises `ApiError`, which names the field."""
    names = [name for name, _ in form.multi_items()]
    for name in names:
        if name not in _FIELDS:
            raise ApiError(400, f"Unknown parameter: {name[:64]}.", param=name[:64], code="unknown_parameter")
        if names.count(name) > 1:
            raise ApiError(400, f"{name} is given twice.", param=name, code="invalid_value")
    for name in ("file", "purpose"):
        if name not in names:
            raise ApiError(400, f"Missing required parameter: {name}.", param=name, code="missing_required_parameter")
    upload = form["file"]
    if not isinstance(upload, UploadFile):
        raise ApiError(400, "file must be an uploaded file.", param="file", code="invalid_value")
    purpose = form["purpose"]
    if not isinstance(purpose, str) or purpose not in _PURPOSES:
        message = f"purpose must be one of {', '.join(_PURPOSES)}."
        raise ApiError(400, message, param="purpose", code="invalid_value")
    return upload, purpose, _lifetime(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))


def _lifetime(anchor: object, seconds: object) -> float:
    if anchor is None and seconds is None:
        return LONGEST_LIFETIME_SECONDS
    if anchor != "created_at":
        message = "expires_after.anchor must be 'created_at'."
        raise ApiError(400, message, param="expires_after.anchor", code="invalid_value")
    if not isinstance(seconds, str) or not re.fullmatch("[0-9]{4,7}", seconds):
        seconds = "0"
    if not 3600 <= int(seconds) <= LONGEST_LIFETIME_SECONDS:
        message = f"expires_after.seconds must be between 3600 and {LONGEST_LIFETIME_SECONDS}."
        raise ApiError(400, message, param="expires_after.seconds", code="invalid_value")
    return float(seconds)

"""`/v1/videos/characters`: what a clip shows, kept under a name for later videos to begin with."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.datastructures import UploadFile

from serving.api.auth import Owner
from serving.api.beginnings import Beginnings
from serving.api.body import opened_body
from serving.api.document import NO_NUL
from serving.api.errors import ApiError
from serving.api.models import Catalog
from serving.api.schemas import parse, without_nul
from serving.jobs.files import StoredFile
from serving.jobs.storage import Storage


class CreateCharacterRequest(BaseModel):
    """The form of `POST /v1/videos/characters`, beside the `video` itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=80)

    @field_validator("name")
    @classmethod
    def _without_nul(cls, text: str) -> str | None:
        return without_nul(text)


class CharacterObject(BaseModel):
    """OpenAI's character object."""

    id: str
    name: str
    created_at: int


class DeletedCharacter(BaseModel):
    id: str
    deleted: bool = True


_DOCUMENT = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["video", "name"],
                    "properties": {
                        "video": {"type": "string", "format": "binary"},
                        "name": {"type": "string", "minLength": 1, "maxLength": 80, "pattern": NO_NUL},
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}


def characters_router(storage: Storage, catalog: Catalog, beginnings: Beginnings) -> APIRouter:
    router = APIRouter(prefix="/v1/videos/characters", tags=["videos"])

    @router.post("", openapi_extra=_DOCUMENT)
    async def create_character(request: Request, owner: Owner) -> CharacterObject:
        """A video that names it in `characters` begins with the picture in the middle of the uploaded clip."""
        async with opened_body(request) as (values, form):
            given = values.pop("video", None) if isinstance(values, dict) else None
            body = parse(CreateCharacterRequest, values, form=form)
            if given is None:
                message = "Missing required parameter: video."
                raise ApiError(400, message, param="video", code="missing_required_parameter")
            if not isinstance(given, UploadFile):
                raise ApiError(400, "video must be an uploaded file.", param="video", code="invalid_value")
            if not any(bundle.manifest.encodes for bundle in catalog.bundles.values()):
                message = "Characters are not supported by any model here: none has an encoder for frames."
                raise ApiError(400, message, param="video", code="unsupported_by_model")
            return _shown(await beginnings.keep_character(given, body.name, owner))

    @router.get("/{character_id}")
    async def retrieve_character(character_id: str, owner: Owner) -> CharacterObject:
        return _shown(await beginnings.character(character_id, owner, "character_id"))

    @router.delete("/{character_id}")
    async def delete_character(character_id: str, owner: Owner) -> DeletedCharacter:
        """Videos that began with it stay as they are."""
        await storage.files.remove(await beginnings.character(character_id, owner, "character_id"))
        return DeletedCharacter(id=character_id)

    return router


def _shown(character: StoredFile) -> CharacterObject:
    return CharacterObject(id=character.id, name=character.filename, created_at=int(character.created_at))

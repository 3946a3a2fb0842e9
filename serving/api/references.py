"""What OpenAI's API makes of other videos: remixes, edits, extensions, characters. No model that is served can, yet."""

from __future__ import annotations

from typing import NoReturn

from fastapi import APIRouter

from serving.api.errors import ApiError


def references_router() -> APIRouter:
    """Clear answers instead of a 404, which a client would take for a wrong base URL."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    def refuse(what: str, param: str | None) -> NoReturn:
        raise ApiError(400, f"{what} is not supported by this model.", param=param, code="unsupported_by_model")

    @router.post("/{video_id}/remix")
    async def remix_video(video_id: str) -> None:
        refuse("Remixing", None)

    @router.post("/edits")
    async def edit_video() -> None:
        refuse("Editing a video", "video")

    @router.post("/extensions")
    async def extend_video() -> None:
        refuse("Extending a video", "video")

    @router.post("/characters")
    async def create_character() -> None:
        refuse("Making a character", "video")

    @router.get("/characters/{character_id}")
    async def retrieve_character(character_id: str) -> None:
        raise ApiError(404, f"There is no character {character_id[:64]!r}.", param="character_id", code="not_found")

    return router

"""`GET /v1/models`: what can be asked for, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import APIRouter

from models.bundle import Manifest
from serving.api.errors import ApiError
from serving.api.schemas import ModelList, ModelObject, model_object


@dataclass(frozen=True, slots=True)
class Catalog:
    """The served models by name; the first is what a request without `model` gets."""

    manifests: Mapping[str, Manifest]
    created: int

    def resolve(self, name: str | None) -> tuple[str, Manifest]:
        """A request's `model`. Raises `ApiError` (404) for one that isn't served."""
        if name is None:
            name = next(iter(self.manifests))
        if name not in self.manifests:
            served = ", ".join(self.manifests)
            message = f"There is no model {name[:64]!r}; there is: {served}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name, self.manifests[name]


def models_router(catalog: Catalog) -> APIRouter:
    router = APIRouter(prefix="/v1/models", tags=["models"])

    @router.get("")
    async def list_models() -> ModelList:
        return ModelList(data=[model_object(name, m, catalog.created) for name, m in catalog.manifests.items()])

    @router.get("/{model}")
    async def retrieve_model(model: str) -> ModelObject:
        name, manifest = catalog.resolve(model)
        return model_object(name, manifest, catalog.created)

    return router

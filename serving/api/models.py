"""`GET /v1/models`: what can be asked for, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import APIRouter

from models.bundle import MANIFEST, Bundle, Manifest
from serving.api.errors import ApiError
from serving.api.schemas import ModelList, ModelObject, model_object
from serving.stage_config import RewriterConfig


@dataclass(frozen=True, slots=True)
class Catalog:
    """The served models by name; the first is what a request without `model` gets. `aliases` are other names."""

    bundles: Mapping[str, Bundle]
    aliases: Mapping[str, str]
    rewriter: RewriterConfig = field(default_factory=RewriterConfig)

    @property
    def priced(self) -> list[str]:
        """Those whose cost was measured."""
        return [name for name, bundle in self.bundles.items() if bundle.manifest.cost is not None]

    def resolve(self, name: str | None) -> tuple[str, Manifest]:
        """A request's `model`. Raises `ApiError` (404) for one that isn't served."""
        if name is None:
            name = next(iter(self.bundles))
        name = self.aliases.get(name, name)
        if name not in self.bundles:
            served = ", ".join(self.bundles)
            message = f"There is no model {name[:64]!r}; there is: {served}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name, self.bundles[name].manifest


def models_router(catalog: Catalog) -> APIRouter:
    router = APIRouter(prefix="/v1/models", tags=["models"])

    def described(name: str) -> ModelObject:
        """Under the name that it was asked for by."""
        bundle = catalog.bundles[catalog.resolve(name)[0]]
        return model_object(name, bundle.manifest, created=int((bundle.root / MANIFEST).stat().st_mtime))

    @router.get("")
    async def list_models() -> ModelList:
        return ModelList(data=[described(name) for name in [*catalog.bundles, *catalog.aliases]])

    @router.get("/{model}")
    async def retrieve_model(model: str) -> ModelObject:
        return described(model)

    return router

"""Request bodies in the OpenAPI document: read by hand, since they may be JSON or a form, and so described by hand.

What the served models allow stands there too, so that whoever generates a client or a form of it knows the limits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from models.bundle import LimitsInfo
from serving.api.models import Catalog
from serving.media.fmp4 import CODECS
from serving.pipeline.request import MAX_BEST_OF, MAX_GUIDANCE_SCALE, MAX_LORA_SCALE, MAX_SEED, MIN_GUIDANCE_SCALE
from serving.pipeline.shortcuts import CACHES, GUIDANCE_CACHES
from serving.pipeline.stages import DECODERS

_JSON, _FORM = "application/json", "multipart/form-data"
# Something to see, and no NUL, which PostgreSQL can't keep.
_TEXT = r"^[^\x00]*[^\s\x00][^\x00]*$"
NO_NUL = r"^[^\x00]*$"
# What pydantic takes for true or false where everything is text.
_SPELT_BOOLEAN = {
    "type": ["boolean", "integer", "string"],
    "minimum": 0,
    "maximum": 1,
    "pattern": "^([01tTfFyYnN]|[Tt]rue|[Ff]alse|[Oo]n|[Oo]ff|[Yy]es|[Nn]o)$",
}
_UPLOAD = {"type": "string", "format": "binary"}
_ID = "[0-9a-f]{32}"


def id_pattern(prefix: str) -> str:
    """Of an id that begins with `prefix`."""
    return f"^{prefix}{_ID}$"


def body_document(
    body: type[BaseModel], catalog: Catalog, *, webhooks: bool, video: bool = False, picture: bool = False
) -> dict[str, Any]:
    """A route's `requestBody` for a `body` that makes a video of one of the catalog's models."""
    document = {}
    encodes = any(bundle.manifest.encodes for bundle in catalog.bundles.values())
    for kind in (_JSON, _FORM):
        schema = body.model_json_schema()
        for name, limit in _limits(catalog, webhooks).items():
            if name in schema["properties"]:
                # The model's own rules hold beside it, whether it may be null among them.
                schema["properties"][name] |= _bounded(schema["properties"][name], limit)
        upload = [_UPLOAD] if kind == _FORM else []
        if video:
            schema["properties"]["video"] = {"anyOf": [_reference("id", id_pattern("video_")), *upload]}
            schema["required"] = [*schema["required"], "video"]
        if picture and encodes:
            references = [_reference("image_url", "^(data:|https?://)"), _reference("file_id", id_pattern("file-"))]
            schema["properties"]["input_reference"] = {"anyOf": [*references, *upload]}
            character = _reference("id", id_pattern("char_"))
            schema["properties"]["characters"] = {"type": "array", "items": character, "minItems": 1, "maxItems": 1}
        document[kind] = {"schema": _spelt(schema) if kind == _FORM else schema}
    return {"requestBody": {"required": True, "content": document}}


def json_document(body: type[BaseModel], *, webhooks: bool) -> dict[str, Any]:
    """A route's `requestBody` that is JSON alone."""
    schema = body.model_json_schema()
    schema["properties"]["webhook_url"] |= _bounded(schema["properties"]["webhook_url"], _webhook(webhooks))
    return {"requestBody": {"required": True, "content": {_JSON: {"schema": schema}}}}


def _limits(catalog: Catalog, webhooks: bool) -> dict[str, dict[str, Any]]:
    """What each parameter may be: as much as the most generous model allows."""
    manifests = [bundle.manifest for bundle in catalog.bundles.values()]
    limits = [manifest.limits for manifest in manifests]
    longest = max(limit.max_seconds for limit in limits)
    characters = max(limit.max_prompt_characters for limit in limits)
    scene = {
        "type": "object",
        "required": ["start_seconds", "prompt"],
        "properties": {
            "start_seconds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": longest},
            "prompt": {"type": "string", "maxLength": characters, "pattern": _TEXT},
        },
        "additionalProperties": False,
    }
    causal = any(manifest.rollout == "causal" for manifest in manifests)
    rewrites = any(catalog.rewriter.serves(manifest) for manifest in manifests)
    chooses = any(manifest.captioner is not None for manifest in manifests)
    decoders = DECODERS if any(manifest.tiny_decoder for manifest in manifests) else DECODERS[:1]
    return {
        "prompt": {"type": "string", "maxLength": characters, "pattern": _TEXT},
        "negative_prompt": {"type": "string", "maxLength": characters, "pattern": NO_NUL},
        "model": {"type": "string", "enum": [*catalog.bundles, *catalog.aliases]},
        "seconds": {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": longest},
                {"type": "string", "enum": [str(seconds) for seconds in range(1, longest + 1)]},
            ]
        },
        "size": {"type": "string", "pattern": _sizes(limits)},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": max(limit.max_steps for limit in limits)},
        "guidance_scale": {"type": "number", "minimum": MIN_GUIDANCE_SCALE, "maximum": MAX_GUIDANCE_SCALE},
        "guidance_interval": {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "minItems": 2,
            "maxItems": 2,
        },
        "cache": {"type": "string", "enum": [*CACHES]},
        "guidance_cache": {"type": "string", "enum": [*GUIDANCE_CACHES]},
        "best_of": {"type": "integer", "minimum": 1, "maximum": MAX_BEST_OF if chooses else 1},
        "rewrite_prompt": {"type": "boolean"} if rewrites else {"type": "boolean", "enum": [False]},
        "scene_prompts": {"type": "array", "items": scene, "maxItems": 100 if causal else 0},
        "lora": _lora([lora.name for manifest in manifests for lora in manifest.loras]),
        "codec": {"type": "string", "enum": [*CODECS]},
        "decoder": {"type": "string", "enum": [*decoders]},
        "webhook_url": _webhook(webhooks),
    }


def _lora(names: list[str]) -> dict[str, Any]:
    if not names:
        return {"type": "array", "maxItems": 0}
    name = {"type": "string", "enum": list(dict.fromkeys(names))}
    asked = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": name,
            "scale": {"type": "number", "minimum": -MAX_LORA_SCALE, "maximum": MAX_LORA_SCALE},
        },
        "additionalProperties": False,
    }
    return {"anyOf": [name, asked, {"type": "array", "items": {"anyOf": [name, asked]}, "maxItems": len(names)}]}


def _webhook(enabled: bool) -> dict[str, Any]:
    return {"type": "string", "pattern": "^https?://", "maxLength": 2048} if enabled else {"type": "null"}


def _sizes(limits: Iterable[LimitsInfo]) -> str:
    """A pattern of every size that some model makes."""
    models = []
    for limit in limits:
        first = -(-limit.min_side // limit.size_multiple) * limit.size_multiple
        sides = "|".join(str(side) for side in range(first, limit.max_side + 1, limit.size_multiple))
        models.append(f"({sides})x({sides})")
    return f"^({'|'.join(dict.fromkeys(models))})$"


def _bounded(property_: dict[str, Any], limit: dict[str, Any]) -> dict[str, Any]:
    options = property_.get("anyOf", [])
    if {"type": "null"} not in options or limit == {"type": "null"}:
        property_.pop("anyOf", None)
        return limit
    return {"anyOf": [*limit.get("anyOf", [limit]), {"type": "null"}]}


def _spelt(schema: dict[str, Any]) -> dict[str, Any]:
    """The same as a form's: there nothing is null, it is left out. A list or an object can't be spelt in one."""
    properties = {}
    for name, property_ in schema["properties"].items():
        unspelt = ("null", "array", "object") if name == "lora" else ("null", "array")
        options = [one for one in property_.get("anyOf", [property_]) if one.get("type") not in unspelt]
        if options:
            kept = {key: value for key, value in property_.items() if key not in ("anyOf", "default")}
            only = _SPELT_BOOLEAN if options[0].get("type") == "boolean" else options[0]
            properties[name] = kept | ({"anyOf": options} if len(options) > 1 else only)
    return schema | {"properties": properties}


def _reference(key: str, pattern: str) -> dict[str, Any]:
    value = {"type": "string", "pattern": pattern}
    return {"type": "object", "required": [key], "properties": {key: value}, "additionalProperties": False}

"""From what a user asked for to a `VideoSpec`: defaults and limits, the same for the command line and for HTTP."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence
from typing import TypeVar

from models.bundle import Manifest
from serving.media.fmp4 import CODECS
from serving.pipeline.shortcuts import CACHES, GUIDANCE_CACHES
from serving.pipeline.stages import DECODERS, DecoderName, VideoSpec
from serving.pipeline.text import clean_prompt

MAX_SEED = 2**63 - 1
MAX_BEST_OF = 8
_MAX_SCENES = 100
_C = TypeVar("_C", bound=str)
MIN_GUIDANCE_SCALE, MAX_GUIDANCE_SCALE = 1.0, 20.0
# A LoRA at a negative scale turns away from what it was trained for.
MAX_LORA_SCALE = 4.0


class InvalidRequest(ValueError):  # noqa: N818
    """What was asked for can't be made: `param` names the parameter, `message` says what it must be."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


def make_spec(
    manifest: Manifest,
    prompt: object,
    *,
    seconds: object = None,
    size: object = None,
    seed: object = None,
    negative_prompt: object = None,
    num_inference_steps: object = None,
    guidance_scale: object = None,
    scene_prompts: object = None,
    rewrite_prompt: object = None,
    best_of: object = None,
    guidance_interval: object = None,
    cache: object = None,
    guidance_cache: object = None,
    lora: object = None,
    codec: object = None,
    decoder: object = None,
    can_rewrite: bool | None = None,
    rewrite_by_default: bool = True,
) -> VideoSpec:
    """Check everything against the bundle's limits; `None` means the default, and for `seed` a random one.

    `seconds` may be a number or, as in OpenAI's API, a string of digits; `size` is "WIDTHxHEIGHT" in pixels;
    `scene_prompts` is a list of objects with `start_seconds` and `prompt`; `lora` is a name, an object with `name` and
    perhaps `scale`, or a list of such. Values come straight from JSON, so their
    types are checked too. `can_rewrite` says whether there is a rewriter (`None`: if the bundle has one),
    `rewrite_by_default` what a `rewrite_prompt` of `None` means. Raises `InvalidRequest` for the first parameter that
    won't do.
    """
    limits, sampler = manifest.limits, manifest.sampler
    if isinstance(seconds, str) and re.fullmatch(r"[0-9]{1,9}", seconds):
        seconds = int(seconds)
    width, height = _size(manifest, size)
    can_rewrite = manifest.rewriter is not None if can_rewrite is None else can_rewrite
    length = _whole("seconds", seconds, limits.default_seconds, 1, limits.max_seconds)
    return VideoSpec(
        prompt=_text("prompt", prompt, limits.max_prompt_characters, required=True),
        negative_prompt=_text(
            "negative_prompt", "" if negative_prompt is None else negative_prompt, limits.max_prompt_characters
        ),
        width=width,
        height=height,
        frames=1 + manifest.fps * length,
        seed=_whole("seed", seed, secrets.randbits(32) if seed is None else 0, 0, MAX_SEED),
        num_inference_steps=_whole(
            "num_inference_steps", num_inference_steps, sampler.num_inference_steps, 1, limits.max_steps
        ),
        guidance_scale=_guidance_scale(guidance_scale, sampler.guidance_scale),
        sampler=sampler.name,
        rewrite_prompt=_rewrite_prompt(rewrite_prompt, can_rewrite, rewrite_by_default),
        best_of=_best_of(manifest, best_of),
        scene_prompts=_scenes(manifest, scene_prompts, length),
        guidance_interval=_interval(guidance_interval),
        cache=_choice("cache", cache, CACHES),
        guidance_cache=_choice("guidance_cache", guidance_cache, GUIDANCE_CACHES),
        lora=_loras(manifest, lora),
        codec=_choice("codec", codec, CODECS),
        decoder=_choice(
            "decoder",
            decoder,
            decoders_of(manifest),
            "" if manifest.tiny_decoder else f": {manifest.name} has no other",
        ),
    )


def _text(param: str, value: object, max_characters: int, *, required: bool = False) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(param, f"{param} must be a string, not {_kind(value)}")
    if len(value) > max_characters:
        raise InvalidRequest(param, f"{param} has {len(value)} characters; at most {max_characters} are allowed")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        raise InvalidRequest(param, f"{param} is not valid Unicode text") from None
    if required and not clean_prompt(value):
        raise InvalidRequest(param, f"{param} must not be empty")
    return value


def _rewrite_prompt(value: object, possible: bool, default: bool) -> bool:
    if value is None:
        return possible and default
    if not isinstance(value, bool):
        raise InvalidRequest("rewrite_prompt", f"rewrite_prompt must be true or false, not {_kind(value)}")
    if value and not possible:
        raise InvalidRequest("rewrite_prompt", "rewrite_prompt is not possible: this model has no rewriter")
    return value


def _best_of(manifest: Manifest, value: object) -> int:
    count = _whole("best_of", value, 1, 1, MAX_BEST_OF)
    if count > 1 and manifest.captioner is None:
        raise InvalidRequest("best_of", "best_of must be 1: this model has no captioner to choose with")
    return count


def decoders_of(manifest: Manifest) -> tuple[DecoderName, ...]:
    """What `decoder` may be."""
    return DECODERS if manifest.tiny_decoder else DECODERS[:1]


def _loras(manifest: Manifest, value: object) -> tuple[tuple[str, float], ...]:
    param, known = "lora", [lora.name for lora in manifest.loras]
    if value is None or value == []:
        return ()
    found: dict[str, float] = {}
    for item in value if isinstance(value, list) else [value]:
        asked = {"name": item} if isinstance(item, str) else item
        if not isinstance(asked, dict) or "name" not in asked or not asked.keys() <= {"name", "scale"}:
            raise InvalidRequest(param, f"{param} must be a name, or an object with a name and perhaps a scale")
        name, scale = asked["name"], asked.get("scale", 1.0)
        if name not in known:
            served = f"one of {', '.join(known)}" if known else "left out: this model has none"
            raise InvalidRequest(param, f"{param} must be {served}, and not {_short(name)!r}")
        if name in found:
            raise InvalidRequest(param, f"{param} names {name} twice")
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) <= MAX_LORA_SCALE:
            raise InvalidRequest(
                param, f"{param} must have a scale between {-MAX_LORA_SCALE:g} and {MAX_LORA_SCALE:g} for {name}"
            )
        found[name] = float(scale)
    return tuple(found.items())


def _whole(param: str, value: object, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(param, f"{param} must be a whole number, not {_kind(value)}")
    if not low <= value <= high:
        raise InvalidRequest(param, f"{param} must be between {low} and {high}, not {_short(value)}")
    return value


def _guidance_scale(value: object, default: float) -> float:
    param = "guidance_scale"
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequest(param, f"{param} must be a number, not {_kind(value)}")
    # Compared before it is made a float: a whole number from JSON can be larger than any float.
    if not MIN_GUIDANCE_SCALE <= value <= MAX_GUIDANCE_SCALE or math.isnan(value):
        raise InvalidRequest(
            param, f"{param} must be between {MIN_GUIDANCE_SCALE:g} and {MAX_GUIDANCE_SCALE:g}, not {_short(value)}"
        )
    return float(value)


def _interval(value: object) -> tuple[float, float]:
    param = "guidance_interval"
    if value is None:
        return 0.0, 1.0
    match value:
        case [int() | float() as one, int() | float() as other] if 0 <= min(one, other) <= max(one, other) <= 1:
            return float(min(one, other)), float(max(one, other))
    raise InvalidRequest(param, f"{param} must be two numbers from 0 to 1, not {_short(value)}")


def _choice(param: str, value: object, choices: Sequence[_C], hint: str = "") -> _C:
    """The first of them when none is named."""
    if value is None:
        return choices[0]
    for choice in choices:
        if value == choice:
            return choice
    said = f"one of {', '.join(choices)}" if len(choices) > 2 else " or ".join(choices)
    raise InvalidRequest(param, f"{param} must be {said}, not {_kind(value)}{hint}")


def _scenes(manifest: Manifest, value: object, seconds: int) -> tuple[tuple[float, str], ...]:
    """Ordered by time. No prompt can change in the middle of a chunk, so not more than one change a chunk is of use."""
    param = "scene_prompts"
    if value is None or value == []:
        return ()
    if manifest.rollout != "causal":
        raise InvalidRequest(param, f"{param} needs a causal model, and {manifest.name} is {manifest.rollout}")
    if not isinstance(value, list):
        raise InvalidRequest(param, f"{param} must be a list, not {_kind(value)}")
    scenes: dict[float, str] = {}
    for item in value:
        if not isinstance(item, dict) or item.keys() != {"start_seconds", "prompt"}:
            raise InvalidRequest(param, f"{param} must hold objects with start_seconds and prompt alone")
        start = item["start_seconds"]
        if not isinstance(start, int | float) or isinstance(start, bool) or not 0 < start < seconds:
            raise InvalidRequest(
                param, f"{param} must have start_seconds between 0 and {seconds}, and not {_short(start)}"
            )
        if float(start) in scenes or len(scenes) == _MAX_SCENES:
            raise InvalidRequest(param, f"{param} must be at most {_MAX_SCENES} of different start_seconds")
        try:
            scenes[float(start)] = _text("prompt", item["prompt"], manifest.limits.max_prompt_characters, required=True)
        except InvalidRequest as error:
            raise InvalidRequest(param, f"{param}: {error.message}") from None
    return tuple(sorted(scenes.items()))


def _size(manifest: Manifest, value: object) -> tuple[int, int]:
    limits = manifest.limits
    if value is None:
        return limits.default_size
    if not isinstance(value, str):
        raise InvalidRequest("size", f"size must be a string like 128x128, not {_kind(value)}")
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value)
    if match is None:
        raise InvalidRequest("size", f"size must be WIDTHxHEIGHT in pixels, like 128x128, not {_short(value)!r}")
    width, height = int(match[1]), int(match[2])
    for side in (width, height):
        if not limits.min_side <= side <= limits.max_side:
            raise InvalidRequest(
                "size", f"size must have sides between {limits.min_side} and {limits.max_side} pixels, not {value}"
            )
        if side % limits.size_multiple:
            raise InvalidRequest("size", f"size must have sides that are multiples of {limits.size_multiple}: {value}")
    return width, height


def _kind(value: object) -> str:
    """What JSON calls the value, with the value itself where it helps."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return f"the number {_short(value)}"
    if isinstance(value, str):
        return f"the string {_short(value)!r}"
    return {list: "a list", dict: "an object", type(None): "null"}.get(type(value), type(value).__name__)


def _short(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # Python won't print integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else text[:40] + "…"

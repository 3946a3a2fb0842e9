"""Defaults and limits: what is accepted, and which parameter an error names."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import LatentInfo, LimitsInfo, Manifest, SamplerInfo, TextInfo
from serving.pipeline.request import InvalidRequest, make_spec

MANIFEST = Manifest(
    name="tiny",
    family="wan",
    rollout="bidirectional",
    fps=16,
    chunk_latent_frames=3,
    text=TextInfo(tokenizer="tokenizer.json", max_tokens=64, dim=8),
    latent=LatentInfo(channels=4, spatial=16, temporal=4, patch=2),
    sampler=SamplerInfo(name="unipc", shift=3.0, num_inference_steps=20, guidance_scale=3.0),
    limits=LimitsInfo(
        default_size=(128, 128), min_side=64, max_side=256, size_multiple=16, default_seconds=2, max_seconds=8
    ),
    graphs={},
    files={},
    versions={},
)


def refused(**asked: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        make_spec(MANIFEST, **{"prompt": "a red ball", **asked})
    return caught.value


def test_defaults_come_from_the_bundle() -> None:
    spec = make_spec(MANIFEST, "a red ball")
    assert (spec.prompt, spec.negative_prompt) == ("a red ball", "")
    assert (spec.width, spec.height, spec.frames) == (128, 128, 33)
    assert (spec.num_inference_steps, spec.guidance_scale, spec.sampler) == (20, 3.0, "unipc")


CAUSAL = MANIFEST.model_copy(update={"rollout": "causal"})


def test_scenes_are_ordered_by_time() -> None:
    scenes = [{"start_seconds": 1.5, "prompt": "a cone"}, {"start_seconds": 1, "prompt": "a cube"}]
    assert make_spec(CAUSAL, "a ball", scene_prompts=scenes).scene_prompts == ((1.0, "a cube"), (1.5, "a cone"))
    assert (
        make_spec(CAUSAL, "a ball").scene_prompts == make_spec(MANIFEST, "a ball", scene_prompts=[]).scene_prompts == ()
    )


@pytest.mark.parametrize(
    "scenes",
    [
        "a cube",
        ["a cube"],
        [{"prompt": "a cube"}],
        [{"start_seconds": 1, "prompt": "a cube", "seed": 1}],
        [{"start_seconds": 1, "prompt": " "}],
        [{"start_seconds": 1, "prompt": None}],
        *([{"start_seconds": start, "prompt": "a cube"}] for start in (0, -1, 2, "1", True, float("nan"), 10**400)),
        [{"start_seconds": 1, "prompt": "a cube"}, {"start_seconds": 1.0, "prompt": "a cone"}],
    ],
    ids=lambda scenes: str(scenes)[:60],
)
def test_scenes_that_will_not_do(scenes: object) -> None:
    with pytest.raises(InvalidRequest, match="scene_prompts") as caught:
        make_spec(CAUSAL, "a ball", scene_prompts=scenes)
    assert caught.value.param == "scene_prompts"


def test_a_bidirectional_model_has_one_prompt() -> None:
    assert "needs a causal model" in refused(scene_prompts=[{"start_seconds": 1, "prompt": "a cube"}]).message


def test_without_a_seed_every_video_gets_another_one() -> None:
    assert len({make_spec(MANIFEST, "a red ball").seed for _ in range(8)}) > 1


def test_prompts_are_rewritten_where_they_can_be_unless_asked_otherwise() -> None:
    def rewritten(asked: object = None, **options: bool) -> bool:
        return make_spec(MANIFEST, "a red ball", rewrite_prompt=asked, **options).rewrite_prompt

    assert [rewritten(), rewritten(False), rewritten(can_rewrite=True)] == [False, False, True]
    assert not rewritten(can_rewrite=True, rewrite_by_default=False)
    assert rewritten(True, can_rewrite=True, rewrite_by_default=False)
    assert not rewritten(False, can_rewrite=True)
    assert (refused(rewrite_prompt=True).param, refused(rewrite_prompt="yes").param) == ("rewrite_prompt",) * 2
    assert refused(best_of=2).param == "best_of"


def test_what_is_asked_for_is_taken() -> None:
    spec = make_spec(
        MANIFEST,
        "a red ball",
        seconds="4",
        size="256x64",
        seed=7,
        negative_prompt="blur",
        num_inference_steps=5,
        guidance_scale=1,
    )
    assert (spec.width, spec.height, spec.frames, spec.seed) == (256, 64, 65, 7)
    assert (spec.negative_prompt, spec.num_inference_steps, spec.guidance_scale) == ("blur", 5, 1.0)


@pytest.mark.parametrize(
    ("param", "value", "says"),
    [
        ("prompt", "", "must not be empty"),
        ("prompt", " \n\t", "must not be empty"),
        ("prompt", "&amp;nbsp; ", "must not be empty"),
        ("prompt", "x" * 40_000, "40000 characters; at most 4000"),
        ("prompt", "half a pair \ud83d", "not valid Unicode"),
        ("prompt", None, "must be a string, not null"),
        ("prompt", ["a red ball"], "must be a string, not a list"),
        ("negative_prompt", 0, "must be a string, not the number 0"),
        ("negative_prompt", "x" * 4001, "at most 4000"),
        ("codec", "hevc", "one of h264, av1, vp9, not the string 'hevc'"),
        ("codec", ["av1"], "one of h264, av1, vp9"),
        ("size", "100x128", "multiples of 16"),
        ("size", "128x100", "multiples of 16"),
        ("size", "512x128", "between 64 and 256"),
        ("size", "16x128", "between 64 and 256"),
        ("size", "0x0", "between 64 and 256"),
        ("size", "128", "WIDTHxHEIGHT"),
        ("size", "128x128x3", "WIDTHxHEIGHT"),
        ("size", "-128x128", "WIDTHxHEIGHT"),
        ("size", "128x128\n", "WIDTHxHEIGHT"),
        ("size", "٦٤x٦٤", "WIDTHxHEIGHT"),
        ("size", "", "WIDTHxHEIGHT"),
        ("size", [128, 128], "a string like 128x128"),
        ("seconds", 9, "between 1 and 8, not 9"),
        ("seconds", "12", "between 1 and 8, not 12"),
        ("seconds", 0, "between 1 and 8"),
        ("seconds", -1, "between 1 and 8"),
        ("seconds", 1.5, "whole number, not the number 1.5"),
        ("seconds", "1.5", "whole number, not the string '1.5'"),
        ("seconds", "two", "whole number"),
        ("seconds", True, "whole number, not a boolean"),
        ("seconds", float("nan"), "whole number"),
        ("seconds", float("inf"), "whole number"),
        ("seed", -1, "between 0"),
        ("seed", 2**63, "between 0"),
        ("seed", "7", "whole number, not the string '7'"),
        ("seed", False, "whole number, not a boolean"),
        ("num_inference_steps", 0, "between 1 and 100"),
        ("num_inference_steps", 101, "between 1 and 100"),
        ("num_inference_steps", {}, "whole number, not an object"),
        ("guidance_scale", 0.5, "between 1 and 20"),
        ("guidance_scale", 21, "between 1 and 20"),
        ("guidance_scale", 10**400, "between 1 and 20"),
        ("guidance_scale", float("nan"), "between 1 and 20"),
        ("guidance_scale", "3", "must be a number, not the string '3'"),
        ("guidance_scale", True, "must be a number, not a boolean"),
    ],
)
def test_an_error_names_the_parameter_and_says_what_it_must_be(param: str, value: Any, says: str) -> None:
    error = refused(**{param: value})
    assert error.param == param
    assert says in error.message
    assert len(error.message) < 200


def test_a_number_too_long_to_print_is_refused_all_the_same() -> None:
    assert refused(seed=10**5000).param == "seed"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("0129x.é ", max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
_PARAMS = ["prompt", "seconds", "size", "seed", "negative_prompt", "num_inference_steps", "guidance_scale"]


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(_PARAMS), _JSON))
def test_any_json_gives_a_spec_within_the_limits_or_a_named_error(asked: dict[str, Any]) -> None:
    try:
        spec = make_spec(MANIFEST, **{"prompt": "a red ball", **asked})
    except InvalidRequest as refusal:
        error = refusal
    else:
        assert 64 <= spec.width <= 256
        assert spec.width % 16 == 0
        assert 1 < spec.frames <= 8 * 16 + 1
        assert 0 <= spec.seed < 2**63
        assert 1 <= spec.num_inference_steps <= 100
        assert 1 <= spec.guidance_scale <= 20
        return
    assert error.param in asked

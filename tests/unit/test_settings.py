"""`rushes.json` and what stands in for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.onnx import ExportError
from export.settings import CheckpointSettings


def test_settings_by_default(tmp_path: Path) -> None:
    path = tmp_path / "My Model_v1"
    path.mkdir()
    settings = CheckpointSettings.load(path)
    assert settings.name == "my-model_v1"
    sampler = settings.sampler_info({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0})
    assert (sampler.name, sampler.shift) == ("euler", 5.0)
    with pytest.raises(ExportError, match="DDIMScheduler"):
        settings.sampler_info({"_class_name": "DDIMScheduler"})


@pytest.mark.parametrize(
    ("index", "tokens", "fps", "steps"),
    [
        ({"_class_name": "WanPipeline"}, 512, 16, 50),
        ({"_class_name": "WanPipeline", "expand_timesteps": True}, 512, 24, 50),
        ({"_class_name": "LTXPipeline"}, 128, 25, 50),
    ],
)
def test_a_family_has_its_own_defaults(
    tmp_path: Path, index: dict[str, Any], tokens: int, fps: int, steps: int
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    settings = CheckpointSettings.load(tmp_path)
    assert (settings.max_tokens, settings.fps, settings.sampler.num_inference_steps) == (tokens, fps, steps)
    (tmp_path / "rushes.json").write_text('{"fps": 8, "sampler": {"num_inference_steps": 3}}')
    settings = CheckpointSettings.load(tmp_path)
    assert (settings.max_tokens, settings.fps, settings.sampler.num_inference_steps) == (tokens, 8, 3)

"""What `python -m models.mini.evaluate` counts and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.mini.evaluate import Scores, contact_sheet, held_out, report, score, wilson
from models.mini.judge import Verdict
from models.mini.world import Attributes, make_scene, render

CONE = Attributes("cone", "cyan", "large", "left", "sand", "sunset")


def test_prompts_are_held_out_distinct_and_always_the_same() -> None:
    asked = held_out(50)
    assert all(a.held_out for a in asked)
    assert len(set(asked)) == 50
    assert held_out(10) == asked[:10]
    assert held_out(50, seed=1) != asked


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),  # R. G. Newcombe, Statistics in Medicine 17, 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_scores_name_what_is_wrong() -> None:
    clip = render(make_scene(CONE, np.random.default_rng(0)))
    scores = score([CONE, replace(CONE, color="red", motion="right")], [clip, clip])
    assert [scores.wrong(0), scores.wrong(1)] == [[], ["color", "motion"]]
    assert scores.counts() == {"shape": 2, "color": 1, "size": 2, "motion": 1, "floor": 2, "light": 2, "all": 1}
    assert scores.accuracies()["all"] == 0.5


def test_a_clip_without_an_attribute_list_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 clips for 2 attributes"):
        score([CONE, CONE], [np.zeros((1, 64, 64, 3), np.uint8)])


def test_reports(tmp_path: Path) -> None:
    scores = Scores([CONE], [Verdict("cone", None, "large", "left", "sand", "sunset")])
    contact_sheet(scores, [np.zeros((9, 64, 96, 3), np.uint8)], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 6 * 96
        assert 64 < sheet.height < 100
    figures = json.loads(json.dumps(report(scores, [30.0, 32.0])))
    assert figures["right"]["all"]["share"] == 0
    assert figures["vae_psnr_db"] == {"mean": 31.0, "lowest": 30.0, "clips": 2}
    assert figures["videos"][0]["wrong"] == ["color"]

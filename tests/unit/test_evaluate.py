"""What `python -m models.mini.evaluate` asks, counts and writes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from models.mini.asks import Ask, captioned, held_out, lasting, loosely
from models.mini.captions import canonical
from models.mini.figures import Answer, accuracies, answer, figures, measures, report, table, wilson
from models.mini.judge import Verdict
from models.mini.render import render
from models.mini.scene import FPS, make_scene
from models.mini.sheet import contact_sheet, strip
from models.mini.videos import decode
from models.mini.world import Attributes, Other

CONE = Attributes("cone", "cyan", "large", "left", "sand", "sunset")
SEEN = Verdict("cone", "cyan", "large", "left", "sand", "sunset", "still")
TWO = replace(CONE, other=Other("ball", "red", "small", "left of"))
SEEN_TWO = replace(
    SEEN, other_shape="ball", other_color="red", other_size="small", other_motion="still", relation="left of"
)


def mp4(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in [*(av.VideoFrame.from_ndarray(f, format="rgb24") for f in frames), None]:
            container.mux(stream.encode(frame))
    return file.getvalue()


def ask(attributes: Attributes, group: str = "one", seed: int = 0) -> Ask:
    return Ask(group, attributes, canonical(attributes), seed)  # type: ignore[arg-type]  # a group, as text


def test_prompts_are_held_out_distinct_and_always_the_same() -> None:
    for kind in ("one", "two", "beats"):
        asked = held_out(50, kind)
        assert {(a.kind, a.held_out) for a in asked} == {(kind, True)}
        assert len(set(asked)) == 50
        assert held_out(10, kind) == asked[:10]
        assert held_out(50, kind, seed=1) != asked


def test_requests_say_no_more_than_they_must() -> None:
    first = captioned("one", 3)[2]
    assert first.body == {"prompt": canonical(first.attributes), "seed": 2}


def test_loose_words_are_of_the_same_clips_and_say_whether_to_rewrite() -> None:
    plain, rewritten = loosely(20, False), loosely(20, True)
    assert [a.attributes for a in plain] == [a.attributes for a in rewritten] == held_out(20)
    assert [a.prompt for a in plain] == [a.prompt for a in rewritten]
    assert {a.body["rewrite_prompt"] for a in rewritten} == {True}
    assert {a.body["rewrite_prompt"] for a in plain} == {False}
    assert all(a.prompt != canonical(a.attributes) for a in plain)


def test_long_prompts_can_last() -> None:
    asked = lasting(12, 60)
    assert {a.attributes.motion for a in asked} <= {"bouncing", "spinning", "still"}
    assert {a.attributes.camera for a in asked} <= {"still", "orbit"}
    assert {a.body["seconds"] for a in asked} == {60}


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),  # R. G. Newcombe, Statistics in Medicine 17, 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_a_real_video_is_answered_for_and_a_wrong_one_told() -> None:
    video = decode(mp4(render(make_scene(CONE, np.random.default_rng(0)))))
    assert answer(ask(CONE), video).wrong == []
    wrong = answer(ask(replace(CONE, color="red", motion="right", camera="orbit")), video)
    assert wrong.wrong == ["color", "motion", "camera"]


def test_a_long_video_is_judged_at_both_ends() -> None:
    ball = Attributes("ball", "red", "large", "still", "grey", "noon")
    first = render(make_scene(ball, np.random.default_rng(0)))
    last = render(make_scene(replace(ball, color="blue"), np.random.default_rng(0)))
    same = answer(ask(ball, "long"), np.concatenate([first, first]))
    assert same.wrong == []
    assert same.color_drift_percent == same.size_drift_percent == 0
    changed = answer(ask(ball, "long"), np.concatenate([first, last]))
    assert changed.wrong == ["last color"]
    assert changed.color_drift_percent is not None
    assert changed.color_drift_percent > 50


def test_accuracies_are_over_the_clips_that_have_an_attribute() -> None:
    clip = render(make_scene(CONE, np.random.default_rng(0)))
    shares = accuracies([CONE, replace(CONE, color="red", then="right")], [clip, clip])
    assert (shares["shape"], shares["color"], shares["then"], shares["all"]) == (1, 0.5, 0, 0.5)
    with pytest.raises(ValueError, match="shorter"):
        accuracies([CONE, CONE], [clip])


def answers() -> list[Answer]:
    return [
        Answer(ask(CONE), SEEN),
        Answer(ask(CONE, seed=1), replace(SEEN, color=None)),
        Answer(ask(TWO, "two"), SEEN_TWO),
        Answer(ask(TWO, "two", 1), replace(SEEN_TWO, motion="right")),
        Answer(ask(TWO, "two", 2), replace(SEEN_TWO, other_shape="cube")),
        Answer(ask(CONE, "loose, rewritten"), replace(SEEN, light="noon")),
        Answer(ask(CONE, "long"), SEEN, replace(SEEN, size="small"), 4.0, 12.0),
    ]


def test_figures_by_group() -> None:
    found = {(f.group, f.name): f for f in figures(answers())}
    assert {k: v.right for k, v in found.items() if k[0] == "one"} == {
        ("one", "shape"): 2,
        ("one", "color"): 1,
        ("one", "size"): 2,
        ("one", "motion"): 2,
        ("one", "floor"): 2,
        ("one", "light"): 2,
        ("one", "camera"): 2,
        ("one", "alone"): 2,
        ("one", "all"): 1,
    }
    assert found["one", "all"].bar == 0.95
    assert (found["two", "both objects and relation"].right, found["two", "all"].right) == (2, 1)
    assert [found["long", f"all, {end} two seconds"].right for end in ("first", "last")] == [1, 0]


def test_measures_and_their_bars() -> None:
    found = {(m.group, m.name): m for m in measures(answers(), [31.0, 35.0])}
    assert {name: (m.mean, m.met) for name, m in found.items()} == {
        ("vae", "reconstruction"): (33.0, True),
        ("loose, rewritten", "less than captions"): (50.0, False),
        ("long", "less at the end"): (100.0, False),
        ("long", "color drift"): (4.0, True),
        ("long", "size drift"): (12.0, False),
    }


def test_an_earlier_report_is_compared_with() -> None:
    shares, others = figures(answers()), measures(answers(), [33.0])
    better = figures(answers()[:1])
    before = json.loads(json.dumps(report(answers(), shares, others)))
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(table(better, measures([], [34.5]), before))
    lines = console.export_text().splitlines()
    assert any("color" in line and "100.0%" in line and "50.0% (+50.0)" in line for line in lines)
    assert any("34.5 dB" in line and "33.0 (+1.5)" in line for line in lines)


def test_the_contact_sheet_has_a_row_for_each_video(tmp_path: Path) -> None:
    rows = [strip(np.zeros((9, 64, 96, 3), np.uint8)), strip(np.full((961, 64, 96, 3), 255, np.uint8))]
    contact_sheet(answers()[:2], rows, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 6 * 96
        assert 128 < sheet.height < 220
        assert sheet.getpixel((5, sheet.height - 5)) == (255, 255, 255)
        assert sheet.getpixel((5, 60)) == (0, 0, 0)

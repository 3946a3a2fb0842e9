"""The judge must be trusted before what it says of generated videos is: here it reads clips whose truth is known."""

from __future__ import annotations

from itertools import cycle, islice
from typing import get_args

import numpy as np
import pytest

from models.mini.judge import Verdict, judge
from models.mini.world import Attributes, Motion, all_attributes, make_scene, render

Clips = list[tuple[Attributes, np.ndarray]]
CLIPS = 84


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Random combinations, held-out ones too, as many of each motion."""
    rng = np.random.default_rng(2024)
    world = all_attributes()
    chosen = []
    for motion in islice(cycle(get_args(Motion)), CLIPS):
        kind = [a for a in world if a.motion == motion]
        chosen.append(kind[rng.integers(len(kind))])
    assert any(a.held_out for a in chosen)
    return [(a, render(make_scene(a, rng))) for a in chosen]


def accuracy(pairs: Clips) -> dict[str, float]:
    rights = [judge(frames).right(attributes) for attributes, frames in pairs]
    return {name: float(np.mean([right[name] for right in rights])) for name in rights[0]}


def soft_and_noisy(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A blur of sigma 1 pixel and noise of sigma 4/255: worse than the VAE does."""
    kernel = np.exp(-np.square(np.arange(-3, 4)) / 2)
    kernel /= kernel.sum()
    values = np.pad(frames.astype(np.float32), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    height, width = frames.shape[1:3]
    values = sum(k * values[:, i : i + height] for i, k in enumerate(kernel))  # type: ignore[assignment]
    values = sum(k * values[:, :, i : i + width] for i, k in enumerate(kernel))  # type: ignore[assignment]
    return np.clip(np.rint(values + rng.normal(0, 4, values.shape)), 0, 255).astype(np.uint8)


def test_reads_rendered_clips(clips: Clips) -> None:
    figures = accuracy(clips)
    assert min(figures.values()) >= 0.98, figures


def test_reads_soft_and_noisy_clips(clips: Clips) -> None:
    rng = np.random.default_rng(1)
    figures = accuracy([(a, soft_and_noisy(frames, rng)) for a, frames in clips[:42]])
    assert min(figures.values()) >= 0.95, figures


def test_reads_clips_of_one_second(clips: Clips) -> None:
    figures = accuracy([(a, frames[:17]) for a, frames in clips[:42]])
    assert min(figures.values()) >= 0.95, figures


@pytest.mark.parametrize(("frames", "height", "width"), [(65, 128, 128), (33, 192, 192), (33, 96, 160)])
def test_reads_other_lengths_and_sizes(frames: int, height: int, width: int) -> None:
    attributes = Attributes("cylinder", "orange", "small", "bouncing", "navy", "night")
    clip = render(make_scene(attributes, np.random.default_rng(7), frames), height, width)
    assert all(judge(clip).right(attributes).values())


def test_the_motion_is_read_from_time_and_not_from_a_frame(clips: Clips) -> None:
    opposite = {"left": "right", "right": "left", "closer": "away", "away": "closer"}
    moving = [(a, frames) for a, frames in clips[:28] if a.motion in opposite]
    assert [judge(frames[::-1]).motion for _, frames in moving] == [opposite[a.motion] for a, _ in moving]


def test_a_frozen_clip_is_still(clips: Clips) -> None:
    for _, frames in clips[:7]:
        assert judge(np.repeat(frames[16:17], 33, 0)).motion == "still"


def test_an_empty_scene_has_no_object(clips: Clips) -> None:
    attributes, frames = next((a, f) for a, f in clips if a.motion == "left" and a.size == "small")
    away_from_it = frames[-1:, :, -1:]  # the clip's last column, wide enough to be a scene
    verdict = judge(away_from_it.repeat(128, 2).repeat(33, 0))
    assert verdict == Verdict(None, None, None, None, attributes.floor, attributes.light)


def test_noise_is_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3), np.uint8)
    assert judge(noise) == Verdict(None, None, None, None, None, None)

"""The clip world: what its attributes say is what its geometry and pixels do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.mini.world import (
    FPS,
    FRAMES,
    OBJECT_RGB,
    RADIUS,
    SUNS,
    Attributes,
    Camera,
    Light,
    Motion,
    Scene,
    all_attributes,
    make_scene,
    render,
)

BALL = Attributes("ball", "red", "large", "still", "grey", "noon")


def scene(seed: int = 0, frames: int = FRAMES, **changes: str) -> Scene:
    return make_scene(replace(BALL, **changes), np.random.default_rng(seed), frames)  # type: ignore[arg-type]


def seen_path(scene: Scene) -> np.ndarray:
    """Pixel position `[frames, 2]` of the object's centre."""
    return scene.camera.project(scene.bodies[0].centers, 128, 128)


def is_red(frames: np.ndarray) -> np.ndarray:
    values = frames.astype(int)
    return (values[..., 0] > 2 * values[..., 1]) & (values[..., 0] > 60)


def test_every_combination_once_and_only_cubes_spin() -> None:
    world = all_attributes()
    assert len(world) == len(set(world)) == 8 * 2 * 4 * 3 * (4 * 6 + 1)
    assert {a.shape for a in world if a.motion == "spinning"} == {"cube"}


def test_about_a_tenth_is_held_out_and_every_value_is_in_both_parts() -> None:
    world = all_attributes()
    held, trained = [a for a in world if a.held_out], [a for a in world if not a.held_out]
    assert 0.08 < len(held) / len(world) < 0.12
    for name in Attributes.__slots__:
        values = {getattr(a, name) for a in world}
        assert {getattr(a, name) for a in held} == {getattr(a, name) for a in trained} == values


def test_what_is_held_out_never_changes() -> None:
    held = [index for index, a in enumerate(all_attributes()) if a.held_out]
    assert (len(held), held[:5], held[-1]) == (493, [50, 63, 67, 69, 80], 4777)


def test_a_seed_is_a_clip() -> None:
    clip = render(scene(3, 5, motion="bouncing"))
    assert clip.shape == (5, 128, 128, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, render(scene(3, 5, motion="bouncing")))
    assert not np.array_equal(clip, render(scene(4, 5, motion="bouncing")))


def test_a_short_clip_is_the_start_of_a_long_one() -> None:
    assert np.array_equal(render(scene(1, 3, motion="left")), render(scene(1, 6, motion="left"))[:3])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("motion", "sign"), [("left", -1), ("right", 1)])
def test_sideways(motion: Motion, sign: int, seed: int) -> None:
    steps = np.diff(seen_path(scene(seed, motion=motion))[:, 0]) * sign
    assert (steps > 0).all()
    assert steps.sum() > 128 / 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("motion", "sign"), [("closer", 1), ("away", -1)])
def test_nearer_and_farther(motion: Motion, sign: int, seed: int) -> None:
    body = scene(seed, motion=motion).bodies[0]
    distance = np.linalg.norm(body.centers - Camera.still(FRAMES).positions, axis=-1)
    assert (np.diff(distance) * sign < 0).all()
    assert max(distance[0] / distance[-1], distance[-1] / distance[0]) > 1.5


@pytest.mark.parametrize("seed", range(5))
def test_bouncing_leaves_the_floor_and_comes_back_in_one_place(seed: int) -> None:
    body = scene(seed, motion="bouncing").bodies[0]
    lift = body.centers[:, 1] - body.radius
    assert lift.min() >= -1e-6
    assert lift.min() < 0.2
    assert lift.max() > 0.85
    assert not np.ptp(body.centers[:, [0, 2]], axis=0).any()


@pytest.mark.parametrize("motion", ["still", "spinning"])
def test_standing_objects_stay_and_only_spinning_turns(motion: Motion) -> None:
    body = scene(shape="cube", motion=motion).bodies[0]
    assert not np.ptp(body.centers, axis=0).any()
    turned = np.ptp(body.yaws)
    assert turned == 0 if motion == "still" else turned > np.pi / 2


@pytest.mark.parametrize("motion", ["left", "right", "closer", "away", "still"])
def test_what_does_not_bounce_stands_on_the_floor(motion: Motion) -> None:
    body = scene(2, motion=motion).bodies[0]
    assert body.centers[:, 1] == pytest.approx(body.radius)


def test_sizes_do_not_overlap() -> None:
    radii = {size: [scene(s, size=size).bodies[0].radius for s in range(30)] for size in RADIUS}
    assert max(radii["small"]) * 1.5 < min(radii["large"])


def test_the_object_is_where_the_camera_says() -> None:
    still = scene(5, frames=1)
    rows, columns = np.nonzero(is_red(render(still))[0])
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx(tuple(seen_path(still)[0]), abs=2.5)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (192, 128)])
def test_other_sizes_show_the_same_scene(height: int, width: int) -> None:
    still = scene(5, frames=2)
    clip, reference = render(still, height, width), render(still)
    assert clip.shape == (2, height, width, 3)
    covered, expected = is_red(clip[0]).sum() / height**2, is_red(reference[0]).sum() / 128**2
    assert covered == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("light", list(SUNS))
def test_the_shadow_darkens_the_floor_and_nothing_brightens_it(light: Light) -> None:
    lit = scene(1, frames=1, light=light, motion="bouncing")
    clip = render(lit)[0].astype(int)
    far_away = replace(lit.bodies[0], centers=lit.bodies[0].centers + np.float32([0, 0, 50]))  # behind the camera
    empty = render(replace(lit, bodies=(far_away,)))[0].astype(int)
    floor = (np.arange(128) > 50)[:, None] & ~is_red(clip)
    darker = (clip.sum(-1) < 0.85 * empty.sum(-1)) & floor
    assert darker.sum() > 100
    body = lit.bodies[0]
    sun = np.array(SUNS[light].direction)
    foot = body.centers[0] - sun * body.centers[0, 1] / sun[1]
    x, y = lit.camera.project(np.float32(foot)[None], 128, 128)[0]
    assert darker[int(y), int(x)]


def test_lights_differ_in_brightness() -> None:
    noon, sunset, night = (render(scene(1, 1, light=light)).mean() for light in ("noon", "sunset", "night"))
    assert noon > sunset > 2 * night


@pytest.mark.parametrize("color", list(OBJECT_RGB))
def test_the_object_has_its_color(color: str) -> None:
    still = scene(5, frames=1, color=color)
    x, y = seen_path(still)[0].astype(int)
    seen = render(still)[0, y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3).mean(0)
    hues = np.array(list(OBJECT_RGB.values()))
    hues /= np.linalg.norm(hues, axis=-1, keepdims=True)
    assert list(OBJECT_RGB)[int((hues @ seen).argmax())] == color


def test_a_second_is_fps_frames() -> None:
    body = scene(frames=FPS + 1, motion="left").bodies[0]
    assert -1.3 <= body.centers[-1, 0] - body.centers[0, 0] <= -1.0

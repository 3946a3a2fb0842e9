"""The clip world: what its attributes say is what its geometry and pixels do."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from models.mini.camera import Camera
from models.mini.render import render
from models.mini.scene import FPS, FRAMES, Scene, make_scene
from models.mini.world import (
    KIND_SHARES,
    OBJECT_RGB,
    RADIUS,
    SUNS,
    Attributes,
    CameraMove,
    Kind,
    Light,
    Motion,
    Other,
    Relation,
    all_attributes,
    draw,
)

BALL = Attributes("ball", "red", "large", "still", "grey", "noon")


def scene(seed: int = 0, frames: int = FRAMES, **changes: str) -> Scene:
    return make_scene(replace(BALL, **changes), np.random.default_rng(seed), frames)  # type: ignore[arg-type]  # any attribute


def seen_path(scene: Scene) -> np.ndarray:
    """Pixel position `[frames, 2]` of the object's centre."""
    return scene.camera.project(scene.bodies[0].centers, 128, 128)


def is_red(frames: np.ndarray) -> np.ndarray:
    values = frames.astype(int)
    return (values[..., 0] > 2 * values[..., 1]) & (values[..., 0] > 60)


def test_every_combination_once_and_only_cubes_spin() -> None:
    world = all_attributes()
    assert len(world) == len(set(world)) == 8 * 2 * 4 * 3 * 6 * (4 * 6 + 1)
    assert {a.shape for a in world if a.motion == "spinning"} == {"cube"}


def test_about_a_tenth_is_held_out_and_every_value_is_in_both_parts() -> None:
    world = all_attributes()
    held, trained = [a for a in world if a.held_out], [a for a in world if not a.held_out]
    assert 0.08 < len(held) / len(world) < 0.12
    for name in ("shape", "color", "size", "motion", "floor", "light", "camera"):
        values = {getattr(a, name) for a in world}
        assert {getattr(a, name) for a in held} == {getattr(a, name) for a in trained} == values


def test_what_is_held_out_never_changes() -> None:
    held = [index for index, a in enumerate(all_attributes()) if a.held_out]
    assert (len(held), held[:5], held[-1]) == (2966, [0, 4, 8, 20, 37], 28794)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", list(KIND_SHARES))
def test_draws_are_of_the_part_and_kind_asked_for(kind: Kind, held_out: bool) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(rng, held_out, kind) for _ in range(40)]
    assert {(a.kind, a.held_out) for a in drawn} == {(kind, held_out)}
    assert all(a.then != a.motion for a in drawn)
    assert all(a.other is None or a.other.color != a.color for a in drawn)
    assert all(a.shape == "cube" for a in drawn if "spinning" in (a.motion, a.then))


def test_attributes_survive_json() -> None:
    rng = np.random.default_rng(1)
    for kind in KIND_SHARES:
        attributes = draw(rng, kind=kind)
        assert Attributes.from_json(json.loads(json.dumps(attributes.to_json()))) == attributes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("relation", ["left of", "right of", "in front of", "behind"])
def test_a_relation_is_what_the_camera_sees_from_start_to_end(relation: Relation, seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = next(a for a in iter(lambda: draw(rng, kind="two"), None) if a.other and a.other.relation == relation)
    first, other = make_scene(drawn, rng).bodies
    dx, dz = (first.centers - other.centers)[:, [0, 2]].T
    sign = 1 if relation in ("right of", "in front of") else -1
    along, aside = (dx, dz) if relation in ("left of", "right of") else (dz, dx)
    assert (along * sign > np.abs(aside)).all()
    assert not np.ptp(other.centers, axis=0).any()
    assert (np.hypot(dx, dz) > first.radius + other.radius).all()


@pytest.mark.parametrize("kind", ["one", "two", "beats"])
def test_nothing_leaves_the_picture_for_long(kind: Kind) -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        drawn = make_scene(draw(rng, kind=kind), rng)
        for body in drawn.bodies:
            x, y = drawn.camera.project(body.centers, 1, 1).T
            assert ((x > 0) & (x < 1) & (y > 0) & (y < 1)).mean() > 0.6


def test_two_beats_are_two_motions() -> None:
    drawn = scene(3, motion="left", then="bouncing")
    x, y, _ = drawn.bodies[0].centers.T
    assert drawn.change_at is not None
    change = int(np.ceil(drawn.change_at * FPS))
    assert 0.9 <= drawn.change_at <= 1.1
    assert (np.diff(x[:change]) < -0.05).all()
    assert not np.ptp(x[change + 1 :])
    assert not np.ptp(y[: change - 1])
    assert np.ptp(y[change:]) > 0.7


@pytest.mark.parametrize(
    ("move", "sign"), [("pan left", 1), ("pan right", -1), ("zoom in", 0), ("zoom out", 0), ("orbit", 0), ("still", 0)]
)
def test_camera_moves(move: CameraMove, sign: int) -> None:
    camera = scene(1, camera=move).camera
    still = Camera.still(FRAMES)
    middle = FPS  # after one second every camera is where the still one is
    assert camera.positions[middle] == pytest.approx(still.positions[middle], abs=1e-5)
    assert camera.targets[middle] == pytest.approx(still.targets[middle], abs=1e-5)
    ahead = np.tile(np.float32([0, 0.6, 0]), (FRAMES, 1))
    x = camera.project(ahead, 128, 128)[:, 0]
    if sign:
        assert (np.diff(x) * sign > 0).all()
    else:
        assert x == pytest.approx(64, abs=0.01)
    zoom = np.diff(camera.fov_degrees)
    assert {"zoom in": (zoom < 0).all(), "zoom out": (zoom > 0).all()}.get(move, not zoom.any())
    assert camera.moves == (move != "still")
    distance = np.linalg.norm(camera.positions[:, [0, 2]], axis=-1)
    assert distance == pytest.approx(6.0, abs=1e-4)
    assert (np.ptp(camera.positions[:, 0]) > 3) == (move == "orbit")


def test_pans_and_zooms_end_and_an_orbit_goes_on() -> None:
    for move in ("pan left", "zoom in"):
        camera = scene(1, frames=80, camera=move).camera
        assert not np.ptp(camera.targets[2 * FPS :], axis=0).any()
        assert not np.ptp(camera.fov_degrees[2 * FPS :])
    orbit = scene(1, frames=80, camera="orbit").camera
    assert (np.linalg.norm(np.diff(orbit.positions, axis=0), axis=-1) > 0.1).all()


def test_the_nearer_object_hides_the_farther() -> None:
    two = replace(BALL, color="blue", other=Other("ball", "red", "large", "behind"))
    drawn = make_scene(two, np.random.default_rng(0), 1)
    behind, front = drawn.bodies
    moved = replace(behind, centers=front.centers + np.float32([0, 0, -1.7]))
    hidden = is_red(render(replace(drawn, bodies=(moved, front))))
    assert (hidden == is_red(render(replace(drawn, bodies=(front,))))).mean() > 0.99


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

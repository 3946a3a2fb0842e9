"""Token labels say where each object is in the picture, and which one hides the other."""

import numpy as np

from models.mini.places import CELL, CHANNELS, token_labels
from models.mini.scene import HEIGHT, WIDTH, make_scene
from models.mini.world import Attributes, Other

LONE = Attributes("cube", "red", "large", "right", "grey", "noon")


def labels_of(attributes: Attributes, seed: int = 0, frames: int = 33):
    scene = make_scene(attributes, np.random.default_rng(seed), frames)
    return scene, token_labels(scene)


def test_one_label_a_token_and_latent_frame() -> None:
    _, labels = labels_of(LONE)
    assert labels.shape == (9, HEIGHT // CELL, WIDTH // CELL, CHANNELS)


def test_an_object_is_labelled_where_it_is_seen() -> None:
    scene, labels = labels_of(LONE)
    shape, red, large = 1, 4, 13
    for latent, frame in ((0, 0), (4, 14), (8, 30)):
        cells = labels[latent, ..., shape]
        middle = scene.camera.project(scene.bodies[0].centers, HEIGHT, WIDTH)[frame]
        rows, columns = np.indices(cells.shape)
        seen = np.array([(cells * (columns + 0.5)).sum(), (cells * (rows + 0.5)).sum()]) / cells.sum() * CELL
        assert np.abs(seen - middle).max() < 8
    np.testing.assert_array_equal(labels[..., shape], labels[..., red])
    np.testing.assert_array_equal(labels[..., shape], labels[..., large])
    assert not labels[..., [0, 2, 3, 5, 12]].any()


def test_velocity_has_the_motions_sign() -> None:
    for motion, sign in (("right", 1), ("left", -1)):
        _, labels = labels_of(Attributes("ball", "blue", "small", motion, "sand", "night"))
        assert np.sign(labels[1:, ..., -2].sum()) == sign


def test_the_nearer_object_hides_the_other() -> None:
    other = Other("ball", "blue", "large", "in front of")
    _, labels = labels_of(Attributes("cube", "red", "large", "still", "grey", "noon", other=other))
    _, swapped = labels_of(
        Attributes("cube", "red", "large", "still", "grey", "noon", other=Other("ball", "blue", "large", "behind"))
    )
    assert labels[..., 1].sum() > swapped[..., 1].sum()
    assert labels[..., :4].sum(-1).max() <= 1 + 1e-6

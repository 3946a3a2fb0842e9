"""The rewriter and the captioner train for a moment, go on, and are measured."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the export extra")

import torch.distributed as dist  # noqa: E402

from models.mini import device, train_captioner, train_rewriter  # noqa: E402
from models.mini.captioner import Captioner  # noqa: E402
from models.mini.captions import canonical  # noqa: E402
from models.mini.checkpoint import save_words  # noqa: E402
from models.mini.rewriter import Rewriter  # noqa: E402
from models.mini.training import Run  # noqa: E402
from models.mini.world import Attributes, Other, draw  # noqa: E402


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_both_train_go_on_and_become_part_of_a_checkpoint(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(train_rewriter, "BATCH", 4)
    monkeypatch.setattr(train_rewriter, "measure", lambda *_: {"measured": 1.0})
    monkeypatch.setitem(device.RECIPES["cpu"], "captioner", device.Recipe(1e-3, 4, 4))
    rng = np.random.default_rng(0)
    clips = [draw(rng) for _ in range(10)]
    path = tmp_path / "latents-33" / "000000.npz"
    path.parent.mkdir()
    np.savez(
        path,
        latents=rng.standard_normal((10, 32, 3, 4, 4)).astype(np.float16),
        attributes=json.dumps([clip.to_json() for clip in clips]),
        labels=np.zeros((10, 1)),
    )
    for name, train in (
        ("rewriter", train_rewriter.train_rewriter),
        ("captioner", train_captioner.train_captioner),
    ):
        train(Run(tmp_path, name, 0.005, save_every=1000))
        first = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        # However slow this machine is now, that is time for some steps more.
        train(Run(tmp_path, name, 0.01 + 4 * first["seconds"] / 60, save_every=1000))
        assert 0 < first["step"] < torch.load(tmp_path / f"{name}.pt", weights_only=True)["step"]
    save_words(tmp_path, tmp_path / "checkpoint")
    for name, kind in (("rewriter", Rewriter), ("captioner", Captioner)):
        loaded = kind.load(tmp_path / "checkpoint" / name).state_dict()
        averaged = torch.load(tmp_path / f"{name}-averaged.pt", weights_only=True)[name]
        assert all(torch.equal(loaded[key], value.half().float()) for key, value in averaged.items())


def test_the_rewriters_figures_count_what_is_named():
    class Perfect:
        """Knows every answer, for it drew the same prompts."""

        def __init__(self, spoil):
            self.spoil = spoil

        def rewrite(self, prompts, choices):
            rng = np.random.default_rng(11)
            said = [train_rewriter.paraphrase(draw(rng, held_out=True), rng, held_out=True) for _ in prompts]
            captions = [canonical(train_rewriter.complete(p, c)) for p, c in zip(said, choices, strict=True)]
            return [self.spoil(caption) for caption in captions]

    right = train_rewriter.measure(Perfect(str), 60)
    assert set(right.values()) == {1.0}
    assert {"all", "exact", "shape", "camera", "other relation"} <= right.keys()
    dark = train_rewriter.measure(Perfect(lambda caption: caption.replace("at noon", "at night")), 60)
    assert dark["light"] < 1
    assert dark["shape"] == dark["color"] == 1
    assert dark["exact"] <= dark["all"] < 1
    assert train_rewriter.measure(Perfect(lambda caption: "a ball"), 60)["shape"] == 0


def test_a_captioners_figures_count_each_attribute():
    clip = Attributes("ball", "red", "small", "left", "sand", "noon", other=Other("cube", "blue", "large", "left of"))
    plain = Attributes("cone", "red", "small", "left", "sand", "noon")
    right = train_captioner.agreement([clip, plain], [canonical(clip), canonical(plain)])
    assert set(right.values()) == {1.0}
    assert "then" not in right
    wrong = train_captioner.agreement([clip, plain], [canonical(clip).replace("red", "green"), "nonsense"])
    assert (wrong["color"], wrong["shape"], wrong["other relation"], wrong["all"]) == (0, 0.5, 1, 0)

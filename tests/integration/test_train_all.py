"""`train all` takes every stage within its time and keeps what a checkpoint needs; its tensors may lie elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs the export extra")

from models.mini import device, networks, train_all, train_causal, train_vae, training  # noqa: E402
from models.mini.checkpoint import assemble  # noqa: E402
from models.mini.clips import LONG, Rendered, clips_of  # noqa: E402
from models.mini.device import CPU, Recipe  # noqa: E402
from models.mini.latents import Latents  # noqa: E402
from models.mini.render import render  # noqa: E402
from models.mini.training import Run  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and batches of next to nothing, and a clock that gives each stage four steps."""
    monkeypatch.setitem(device.RECIPES, "cpu", {stage: Recipe(1e-3, 2, 1) for stage in device.RECIPES["cpu"]})
    whole = networks.WanTransformer3DModel

    def slim(**config: object) -> object:
        return whole(**config | {"num_layers": 4, "num_attention_heads": 2, "ffn_dim": 64})

    vae = networks.AutoencoderKLWan

    def narrow(**config: object) -> object:
        return vae(**config | {"base_dim": 4, "decoder_base_dim": 4})

    steps: dict[str, int] = {}

    def clock(run: Run, _: float) -> float:
        steps[run.stage] = steps.get(run.stage, -1) + 1
        return 60 * run.minutes * steps[run.stage] / 4

    monkeypatch.setattr(networks, "WanTransformer3DModel", slim)
    monkeypatch.setattr(networks, "AutoencoderKLWan", narrow)
    monkeypatch.setattr(training, "_clock", clock)
    monkeypatch.setattr(training, "PATIENCE", 3)
    monkeypatch.setattr(train_vae, "_held_out_clips", lambda _: torch.zeros(1, 3, 5, 64, 64))


def test_all_stages_follow_each_other_and_are_kept(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(run: Run, train: object = train_all.train_distil) -> None:
        monkeypatch.setattr(train_causal, "shifted", lambda levels: levels * float("nan"))
        train(run)  # type: ignore[operator]

    monkeypatch.setattr(train_all, "train_distil", diverges)
    folder, keep = tmp_path / "run", tmp_path / "keep"
    train_all.train_all(train_all.Plan(folder, keep, CPU, minutes=60, clips=8, long_clips=8, workers=2))

    kept = {path.name for path in keep.iterdir()}
    stages = ("vae", "dit", "captioner", "causal", "distil", "tiny_decoder")
    assert kept == {"rest.tar", *(f"{stage}-averaged.pt" for stage in stages)}
    for stage in stages:
        states = torch.load(keep / f"{stage}-averaged.pt", weights_only=True).values()
        floats = [value for state in states for value in state.values() if value.is_floating_point()]
        assert all(value.dtype == torch.float16 and value.isfinite().all() for value in floats)
    with tarfile.open(keep / "rest.tar") as tar:
        assert {"all.log", "latent-statistics.json", "causal.json", "causal.png"} <= set(tar.getnames())
    log = (folder / "all.log").read_text().splitlines()
    assert [line.partition(":")[0] for line in log] == list(train_all.SHARES)
    assert not [line for line in log if "failed" in line]
    assert [line.partition(":")[0] for line in log if "no finite gradients" in line] == ["distil"]
    assert "GiB of GPU memory" in log[0]

    # What was kept is enough for a checkpoint, and is what was trained.
    pipeline = assemble(keep, "causal")
    trained = torch.load(folder / "causal-averaged.pt", weights_only=True)["transformer"]
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(value, trained[name], atol=1e-3, rtol=1e-3)
    assert pipeline.vae.config.latents_mean == json.loads((folder / "latent-statistics.json").read_text())[0]

    # The latents are of the clips that the workers rendered.
    data, rendered = Latents.load(folder, LONG), Rendered.open(folder, LONG, 8)
    attributes, scenes = clips_of(0, LONG)
    assert data.attributes == attributes
    assert (rendered.pictures[7] == render(scenes[7])).all()
    assert (data.labels == rendered.labels).all()

    with pytest.raises(FileExistsError, match="begins anew"):
        train_all.train_all(train_all.Plan(folder, keep, CPU, minutes=60, clips=8, long_clips=8, workers=2))


def test_a_stage_that_fails_is_told_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Run) -> None:
        raise torch.OutOfMemoryError("too large\nby far")

    monkeypatch.setattr(train_all, "train_dit", fails)
    assert "failed: OutOfMemoryError: too large" in train_all._one(Run(tmp_path, "dit", 1), {})


def test_no_tensor_is_left_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "other_device.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=None)
    told = [line.split()[0] for line in done.stdout.splitlines()]
    stages = ["vae", "dit", "captioner", "causal", "distil", "tiny_decoder"]
    assert told == [*stages, "samples", "found"], done.stderr[-3000:]

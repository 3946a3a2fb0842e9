"""`rushes export`: what is left on disk is whole or not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from export import checkpoint as export_checkpoint_module
from export import parity, workspace
from export.checkpoint import export_checkpoint
from export.onnx import ExportError, WeightFile, export_graph, leaks
from export.settings import CheckpointSettings
from models import stored
from models.bundle import Bundle, GraphName
from models.families import open_checkpoint
from models.graph import Graph

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)


def test_graphs_carry_nothing_of_the_machine_they_were_made_on(tiny_bundle: Bundle) -> None:
    for name in tiny_bundle.manifest.graphs:
        path = tiny_bundle.path_of(name)
        assert not list(leaks(onnx.load(path, load_external_data=False)))
        data = path.read_bytes()
        for trace in (b".py", b"site-packages", b"torch.nn", str(Path.home()).encode() + b"/", b"/tmp/"):
            assert trace not in data
        onnx.checker.check_model(path)


def test_the_decoders_share_one_weight_file(tiny_bundle: Bundle) -> None:
    places: dict[str, set[tuple[str, str]]] = {}
    for name in ("decoder_first", "decoder_next"):
        model = onnx.load(tiny_bundle.path_of(name), load_external_data=False)
        entries = [{e.key: e.value for e in tensor.external_data} for tensor in model.graph.initializer]
        places[name] = {(entry["offset"], entry["length"]) for entry in entries if entry}
        assert {entry["location"] for entry in entries if entry} == {"decoder.weights"}
    # Upsampling in time is the only part that the first frame doesn't use.
    assert places["decoder_first"] < places["decoder_next"]


def test_weights_that_fit_fp16_are_stored_in_it(tmp_path: Path) -> None:
    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(3)
    module = Layer(64, 64, bias=False).eval()
    batch = torch.export.Dim("batch", min=1, max=64)

    def size(name: str) -> int:
        folder = tmp_path / name
        folder.mkdir()
        graph = Graph("denoiser", module, {"x": torch.ones(2, 64)}, ("y",), {"x": {0: batch}}, "w", ())
        export_graph(graph, WeightFile(folder / "w"))
        got = parity.open_session(folder / graph.file).run(None, {"x": np.ones((5, 64), np.float32)})[0]
        with torch.no_grad():
            assert np.abs(got - module(torch.ones(5, 64)).numpy()).max() < 1e-6
        return (folder / "w").stat().st_size

    assert size("full") == 64 * 64 * 4
    module.weight.data = module.weight.data.half().float()
    assert size("half") == 64 * 64 * 2


@pytest.mark.parametrize("part", ["text_encoder", "denoiser"])
def test_weights_that_stay_on_disk_make_the_same_files(
    part: GraphName, tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Placeholders are traced, turned and renamed like weights, and each is read when it is written."""
    monkeypatch.setattr(stored, "LARGE", 100)
    plan = replace(CheckpointSettings.load(tiny_checkpoint).plan(tiny_checkpoint), lazily=True)
    graph = next(graph for graph in open_checkpoint(tiny_checkpoint, plan).graphs(plan) if graph.name == part)
    assert graph.stored is not None
    assert len(graph.stored.places) > 5
    export_graph(graph, WeightFile(tmp_path / graph.weights))
    for name in (graph.file, graph.weights):
        assert (tmp_path / name).read_bytes() == (tiny_bundle.root / name).read_bytes()


def test_a_weight_that_is_not_on_disk_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (weights,) = (checkpoint / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    del tensors["proj_out.weight"]
    save_file(tensors, weights)
    with pytest.raises(ExportError, match=r"lacks the weight proj_out\.weight"):
        export_checkpoint(checkpoint, tmp_path / "out" / "bundle", verify=False)
    assert not (tmp_path / "out").exists()


# What goes wrong leaves nothing behind.


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(checkpoint: Path, folder: Path) -> str:
    output = folder / "bundle"
    before = entries(folder)
    with pytest.raises(ExportError) as caught:
        export_checkpoint(checkpoint, output)
    assert entries(folder) == before
    return str(caught.value)


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, copy)
    return copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def test_no_checkpoint(folder: Path) -> None:
    assert "model_index.json" in refusal(folder / "nothing", folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"_class_name": "MochiPipeline"},
            "holds a MochiPipeline, but only WanPipeline, WanImageToVideoPipeline, LTXPipeline",
        ),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "two transformers, so `boundary_ratio`"),
        ({"text_encoder": ["transformers", "BertModel"]}, "text encoder BertModel"),
    ],
)
def test_checkpoints_of_another_kind(broken: Path, folder: Path, change: dict[str, Any], words: str) -> None:
    index = json.loads((broken / "model_index.json").read_text()) | change
    (broken / "model_index.json").write_text(json.dumps(index))
    assert words in refusal(broken, folder)


@pytest.mark.parametrize("part", ["tokenizer/tokenizer.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_part_is_missing(broken: Path, folder: Path, part: str) -> None:
    (broken / part).unlink()
    assert refusal(broken, folder)


def test_settings_are_read_strictly(broken: Path, folder: Path) -> None:
    (broken / "rushes.json").write_text('{"sampler": {"stepz": 3}}')
    assert "`sampler.stepz`" in refusal(broken, folder)


@pytest.mark.parametrize("part", ["rewriter", "captioner"])
def test_a_small_model_that_cannot_be_read_is_named(broken: Path, folder: Path, part: str) -> None:
    (broken / part / "config.json").write_text("{")
    assert f"{part} can't be read" in refusal(broken, folder)


def test_a_place_that_holds_something_else_is_left_alone(tiny_checkpoint: Path, folder: Path) -> None:
    (folder / "bundle").mkdir()
    (folder / "bundle" / "thesis.txt").write_text("my only copy")
    assert "is no bundle" in refusal(tiny_checkpoint, folder)
    assert (folder / "bundle" / "thesis.txt").read_text() == "my only copy"


def test_an_interrupted_export_leaves_the_old_bundle(
    tiny_checkpoint: Path, tiny_bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle.root, folder / "bundle")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_checkpoint_module, "_graph", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_checkpoint, folder / "bundle")
    assert entries(folder) == ["bundle"]
    Bundle.load(folder / "bundle").verify()


def test_a_new_bundle_replaces_the_old_one(tiny_bundle: Bundle, folder: Path) -> None:
    shutil.copytree(tiny_bundle.root, folder / "bundle")
    shutil.copytree(tiny_bundle.root, folder / "new")
    (folder / "bundle" / "left over").write_text("")
    workspace._replace(folder / "new", folder / "bundle")
    assert entries(folder) == ["bundle"]
    assert entries(folder / "bundle") == entries(tiny_bundle.root)

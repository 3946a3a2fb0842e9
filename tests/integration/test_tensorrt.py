"""TensorRT takes every graph that is exported: TensorRT-RTX parses and builds each one, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from export.onnx import ExportError
from export.precision import RECIPES, quantize
from export.profiles import Extent, profile_of, profiles_of
from export.tensorrt import Target, build_plan, export_plans, open_target
from models.bundle import SERVED_GRAPHS, Bundle, GraphInfo, TensorInfo
from models.plans import PlanError, PlanInfo, find_plan, graph_digest
from serving.cli import app

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)

EXTENTS = {
    "batch": Extent(1, 2, 4),
    "frames": Extent(1, 3, 9),
    "rows": Extent(1, 4, 8),
    "columns": Extent(1, 4, 8),
}


@pytest.fixture(scope="module")
def target() -> Target:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("pip install tensorrt-rtx (Linux and Windows on x86-64 only)")
    return open_target("tensorrt_rtx", "8.9")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "causal_", "experts_", "ltx_", "cogvideox_"])
def test_every_graph_builds_with_every_profile(
    kind: str, target: Target, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle: Bundle = request.getfixturevalue(f"tiny_{kind}bundle")
    plans = export_plans(bundle, target, tmp_path)
    graphs = [name for name in SERVED_GRAPHS if name in bundle.manifest.graphs]
    assert len(plans) == len(graphs)
    for name, plan in zip(graphs, plans, strict=True):
        info = PlanInfo.model_validate_json(plan.with_suffix(".json").read_bytes())
        assert info.basis.graph == name
        # The default size and any size; the text encoder knows none.
        assert len(info.basis.profiles) == (1 if name == "text_encoder" else 2)
        for profile in info.basis.profiles:
            assert profile.keys() == {tensor.name for tensor in bundle.manifest.graphs[name].inputs}
        digest = graph_digest(bundle, name)
        assert find_plan(tmp_path, name, digest, "tensorrt_rtx", target.version, target.gpu) == plan


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8-static"])
def test_other_precisions_build(
    precision: str, target: Target, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "export.precision.LEAST_WEIGHT", 64
    )  # the tiny model's matrices are smaller than any real one's
    made = quantize(tiny_bundle, tmp_path / "made", precision)  # type: ignore[arg-type]  # a precision, as text
    changed = [name for name in RECIPES[precision].graphs if name in made.manifest.graphs]  # type: ignore[index]  # likewise
    assert len(export_plans(made, target, tmp_path / "plans", graphs=changed, any_size=False)) == len(changed)


def test_a_plan_is_built_once_and_recorded(target: Target, tiny_bundle: Bundle, tmp_path: Path) -> None:
    said: list[str] = []
    (plan,) = export_plans(tiny_bundle, target, tmp_path, graphs=["text_encoder"], progress=said.append)
    before = plan.stat().st_mtime_ns
    assert export_plans(tiny_bundle, target, tmp_path, graphs=["text_encoder"], progress=said.append) == [plan]
    assert said == ["Building text_encoder for sm89"]
    assert plan.stat().st_mtime_ns == before
    # Another flag, another key: both plans stay.
    (other,) = export_plans(tiny_bundle, target, tmp_path, graphs=["text_encoder"], flags=["weight_streaming"])
    assert other != plan
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".plan", ".plan"]
    record = json.loads(plan.with_suffix(".json").read_bytes())
    assert record["bytes"] == plan.stat().st_size
    assert record["basis"]["profiles"] == [{"input_ids": [[1, 64]] * 3, "attention_mask": [[1, 64]] * 3}]


def test_a_damaged_plan_is_not_used(target: Target, tiny_bundle: Bundle, tmp_path: Path) -> None:
    (plan,) = export_plans(tiny_bundle, target, tmp_path, graphs=["text_encoder"])
    digest = graph_digest(tiny_bundle, "text_encoder")
    with pytest.raises(PlanError, match=r"only for tensorrt_rtx .* on sm89: make one with"):
        find_plan(tmp_path, "text_encoder", digest, "tensorrt", "11.4", "NVIDIA H100, sm90")
    data = bytearray(plan.read_bytes())
    data[100] ^= 1
    plan.write_bytes(data)
    with pytest.raises(PlanError, match="delete it and build it again"):
        find_plan(tmp_path, "text_encoder", digest, "tensorrt_rtx", target.version, target.gpu)


def test_an_operator_that_it_does_not_know(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch"]) for name in "xy"]
    node = onnx.helper.make_node("Telepathy", ["x"], ["y"], domain="nowhere")
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("nowhere", 1)]), path)
    with pytest.raises(ExportError, match="Telepathy") as caught:
        build_plan(target, path, [{"x": ((1,), (2,), (3,))}])
    assert "\n" not in str(caught.value)


def test_profiles_follow_the_symbols() -> None:
    def graph(*shape: int | str) -> GraphInfo:
        return GraphInfo(file="g.onnx", inputs=(TensorInfo(name="x", dtype="float32", shape=shape),), outputs=())

    assert profile_of(graph("batch", 16, "2*rows", "rows + 1"), EXTENTS) == {
        "x": ((1, 16, 2, 2), (2, 16, 8, 5), (4, 16, 16, 9))
    }
    assert profile_of(graph(2, 16), EXTENTS) == {}
    with pytest.raises(ExportError, match="no size for the symbol depth"):
        profile_of(graph("depth"), EXTENTS)
    with pytest.raises(ExportError, match="no sum"):
        profile_of(graph("rows//2"), EXTENTS)


def test_profiles_are_the_sizes_and_then_any_size(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    fixed, free = profiles_of(manifest, "denoiser", [(160, 64)], any_size=True, rows=4)
    # 16 pixels a cell, in patches of two cells; two seconds at 16 frames are nine latent frames, eight are 33.
    assert fixed["latents"] == ((1, 8, 1, 4, 10), (2, 8, 9, 4, 10), (4, 8, 33, 4, 10))
    assert free["latents"] == ((1, 8, 1, 4, 4), (2, 8, 9, 8, 8), (4, 8, 33, 16, 16))
    assert fixed["encoder_hidden_states"] == ((1, 64, 16), (2, 64, 16), (4, 64, 16))
    (only,) = profiles_of(manifest, "decoder_next", [], any_size=False, rows=4)
    assert only["latents"] == ((1, 8, 1, 8, 8), (1, 8, 3, 8, 8), (1, 8, 3, 8, 8))
    with pytest.raises(ExportError, match="512x64 is not within tiny's limits of 64 to 256"):
        profiles_of(manifest, "denoiser", [(512, 64)], any_size=True, rows=4)


def test_the_command_builds_and_prints_where(target: Target, tiny_bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["export", "tensorrt", str(tiny_bundle.root), "--cache", str(tmp_path), "--graph", "text_encoder"]
    result = CliRunner().invoke(app, [*arguments, "--runtime", "tensorrt_rtx", "--compute-capability", "8.9"])
    assert result.exit_code == 0, result.output
    assert [Path(line).suffix for line in result.output.splitlines() if line.startswith(str(tmp_path))] == [".plan"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--runtime", "tensorrt_rtx"], "say it, as in --compute-capability 8.9"),
        (["--runtime", "tensorrt_rtx", "--compute-capability", "9.0"], "not 9.0"),
        (["--runtime", "cuda"], "--runtime"),
        (["--graph", "poet"], "--graph must be one of text_encoder, denoiser"),
        (["--size", "64by64"], "--size must be WIDTHxHEIGHT"),
    ],
)
def test_bad_options_are_named(
    target: Target, tiny_bundle: Bundle, tmp_path: Path, options: list[str], said: str
) -> None:
    result = CliRunner().invoke(app, ["export", "tensorrt", str(tiny_bundle.root), "--cache", str(tmp_path), *options])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_without_tensorrt_it_says_what_to_install(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = CliRunner().invoke(app, ["export", "tensorrt", str(tiny_bundle.root), "--cache", str(tmp_path)])
    assert result.exit_code == 2
    assert "pip install 'rushes[tensorrt]'" in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1

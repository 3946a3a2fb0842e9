"""The bundled model in every other precision: near the fp32 one, smaller, served the same, and refused where broken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

import torch
from onnx import TensorProto, helper, numpy_helper

from export import precision as precision_module
from export.onnx import ExportError, leaks
from export.precision import RECIPES, quantize
from export.shapes import size_of
from models.bundle import Bundle, Precision
from models.wan import _quarter_turn
from serving.cli import app
from serving.config import MINI_BUNDLE
from serving.engines.onnx_runtime import OnnxRuntimeEngine

# Of the denoiser: how much smaller its weights are than the master's, which are fp16 on disk, and its error's bound.
EXPECTED: dict[Precision, tuple[float, float]] = {
    "fp16": (1.05, 0.02),
    "int8": (0.65, 0.5),
    "int8-static": (0.65, 1.0),
    "int8-weights": (0.65, 0.3),
    "int4-weights": (0.45, 2.0),
}


@pytest.fixture(scope="module")
def master() -> Bundle:
    return Bundle.load(MINI_BUNDLE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def denoiser_bytes(bundle: Bundle) -> int:
    return bundle.manifest.files["denoiser.weights"].bytes


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_precision_is_near_its_master_and_says_so(master: Bundle, folder: Path, name: Precision) -> None:
    made = quantize(master, folder / "made", name)
    made.verify()
    assert made.manifest.precision is not None
    assert (made.manifest.precision.name, made.manifest.precision.master) == (name, master.digest)
    smaller, error = EXPECTED[name]
    assert denoiser_bytes(made) <= smaller * denoiser_bytes(master)
    denoiser = made.manifest.graphs["denoiser"]
    assert 0 < denoiser.mean_error["velocity"] < denoiser.parity["velocity"] < error
    proof = made.manifest.proof
    assert proof is not None
    assert RECIPES[name].least_psnr <= proof.psnr_db < 100  # it differs, or nothing was converted
    # What it was made with stays out of it, as of any bundle.
    for graph in made.manifest.graphs.values():
        assert not list(leaks(onnx.load(made.root / graph.file, load_external_data=False)))
    # The engines take the same tensors as before.
    for graph_name, graph in made.manifest.graphs.items():
        engine = OnnxRuntimeEngine(made.root / graph.file)
        assert engine.inputs == OnnxRuntimeEngine(master.path_of(graph_name)).inputs


def test_the_time_embedding_and_the_last_projection_keep_fp32(master: Bundle, folder: Path) -> None:
    made = quantize(master, folder / "made", "int8")
    model = onnx.load(made.path_of("denoiser"))
    kinds = [node.op_type for node in model.graph.node]
    before = [node.op_type for node in onnx.load(master.path_of("denoiser"), load_external_data=False).graph.node]
    attention = 2 * 2 * 6  # two products in each of two attentions a layer have no weights
    turns = 2 * 6  # of a layer's queries and keys by RoPE
    assert kinds.count("MatMulInteger") == before.count("MatMul") - attention - turns - 1
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    weights |= {node.output[0] for node in model.graph.node if node.op_type == "Cast"}
    kept = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert len(kept) == before.count("Gemm") + turns + 1  # the quantiser writes a Gemm as MatMul and Add


def test_a_quantized_bundle_makes_a_video(master: Bundle, folder: Path) -> None:
    quantize(master, folder / "made", "int8")
    target = folder / "a.mp4"
    arguments = ["generate", "a small red ball", "--bundle", str(folder / "made"), "--steps", "2", "-o", str(target)]
    result = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert result.exit_code == 0, result.output
    assert target.stat().st_size > 1000


def test_what_is_far_from_its_master_is_not_written(
    master: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(master.root, folder / "made")
    before = Bundle.load(folder / "made").digest
    monkeypatch.setitem(precision_module.RECIPES, "int4-weights", replace(RECIPES["int4-weights"], least_psnr=60))
    with pytest.raises(ExportError, match=r"differs from the fp32 bundle's: \d+\.\d dB, and 60 are needed"):
        quantize(master, folder / "made", "int4-weights")
    assert sorted(path.name for path in folder.iterdir()) == ["made"]
    assert Bundle.load(folder / "made").digest == before


def test_only_an_intact_fp32_bundle_can_be_quantized(master: Bundle, folder: Path) -> None:
    quantize(master, folder / "made", "int8-weights")
    with pytest.raises(ExportError, match="int8-weights already"):
        quantize(Bundle.load(folder / "made"), folder / "again", "fp16")
    shutil.copytree(master.root, folder / "cut")
    with (folder / "cut" / "denoiser.weights").open("r+b") as file:
        file.truncate(1000)
    result = CliRunner().invoke(app, ["quantize", str(folder / "cut"), "-o", str(folder / "from-cut")])
    assert result.exit_code == 2
    assert "copy or export it again" in result.output
    assert not (folder / "again").exists()
    assert not (folder / "from-cut").exists()


def test_bad_arguments_are_named(folder: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(MINI_BUNDLE), "-o", str(folder / "x"), "--precision", "int3"])
    assert result.exit_code == 2
    assert "--precision must be one of fp16, int8" in result.output
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"cat")
    result = CliRunner().invoke(app, ["quantize", str(MINI_BUNDLE), "-o", str(folder / "photos")])
    assert result.exit_code == 2
    assert "is no bundle" in result.output
    assert (folder / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_symbolic_dimensions() -> None:
    assert size_of("2*rows + 1", {"rows": 3}) == 7
    assert size_of(4, {}) == 4
    with pytest.raises(ExportError, match="no size for the symbol columns"):
        size_of("columns", {"rows": 3})
    with pytest.raises(ExportError, match="no sum of symbols"):
        size_of("rows/2", {"rows": 3})
    assert np.prod([size_of(dim, {"batch": 2}) for dim in ("batch", 3)]) == 6


def test_the_turn_of_rope_is_no_weight() -> None:
    """Heads of 64 make it as large as weights are."""
    turn = _quarter_turn(torch.zeros(1, 64)).numpy()
    weight = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    matrices = {"first": weight, "turn": turn, "second": -weight, "last": 2 * weight}
    names = list(matrices)
    nodes = [
        helper.make_node("MatMul", [f"x{n}", name], [f"x{n + 1}"], name=f"by {name}") for n, name in enumerate(names)
    ]
    tensors = [numpy_helper.from_array(matrix, name) for name, matrix in matrices.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("x0", "x4")]
    graph = helper.make_graph(nodes, "denoiser", ends[:1], ends[1:], tensors)
    assert precision_module._weighted(helper.make_model(graph), ["MatMul"]) == ["by first", "by second"]

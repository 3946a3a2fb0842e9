"""TensorRT takes every graph that is exported: TensorRT-RTX parses and builds each one, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from export.onnx import ExportError
from export.tensorrt import Extent, build_plan, profile_of
from models.bundle import SERVED_GRAPHS, Bundle, GraphInfo, TensorInfo

# Exporting takes most of a minute of a free core, and this machine may be busy.
pytestmark = pytest.mark.timeout(900)

EXTENTS = {
    "batch": Extent(1, 2, 4),
    "frames": Extent(1, 3, 9),
    "rows": Extent(1, 4, 8),
    "columns": Extent(1, 4, 8),
    "height": Extent(2, 8, 16),
    "width": Extent(2, 8, 16),
    "tokens": Extent(1, 64, 64),
}


@pytest.fixture(scope="module")
def tensorrt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx (Linux and Windows on x86-64 only)")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "causal_", "experts_", "ltx_"])
def test_every_graph_parses_and_builds(kind: str, tensorrt: Any, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"tiny_{kind}bundle")
    # The rewriter, the captioner and the VAE's encoder are small, and stay on the CPU.
    for name in set(SERVED_GRAPHS) & bundle.manifest.graphs.keys():
        graph = bundle.manifest.graphs[name]
        assert profile_of(graph, EXTENTS).keys() == {tensor.name for tensor in graph.inputs}
        # The causal model's chunk is at most as long as it was trained with.
        extents = EXTENTS | ({"frames": Extent(1, 3, 3)} if kind == "causal_" else {})
        assert len(build_plan(tensorrt, bundle.path_of(name), graph, extents, gpu=False)) > 1000


def test_an_operator_that_it_does_not_know(tensorrt: Any, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch"]) for name in "xy"]
    node = onnx.helper.make_node("Telepathy", ["x"], ["y"], domain="nowhere")
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("nowhere", 1)]), path)
    tensor = TensorInfo(name="x", dtype="float32", shape=("batch",))
    with pytest.raises(ExportError, match="Telepathy") as caught:
        build_plan(tensorrt, path, GraphInfo(file=path.name, inputs=(tensor,), outputs=()), EXTENTS, gpu=False)
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

"""The TensorRT engine over a double of TensorRT, on the bundled model's graphs: what it binds, shares and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import STREAM, FakeCuda, FakeTensorRT, write_plan
from onnx import TensorProto, helper, numpy_helper

from export.profiles import Extent, profile_of
from models.bundle import Bundle
from serving.config import MINI_BUNDLE
from serving.engines.cuda import Cuda, SharedMemory
from serving.engines.engine import EngineError
from serving.engines.onnx_runtime import OnnxRuntimeEngine
from serving.engines.tensorrt import TensorRTEngine

BUNDLE = Bundle.load(MINI_BUNDLE)
CHANNELS = BUNDLE.manifest.latent.channels
RNG = np.random.default_rng(0)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda: FakeCuda) -> FakeTensorRT:
    return FakeTensorRT(cuda)


def decoders(
    folder: Path, trt: FakeTensorRT, cuda: FakeCuda, **said: Any
) -> tuple[TensorRTEngine, TensorRTEngine, SharedMemory]:
    memory = SharedMemory()
    engines = []
    for name, size in (("decoder_first", 100), ("decoder_next", 300)):
        graph = BUNDLE.manifest.graphs[name]  # type: ignore[index]  # a name, as text
        side = Extent(2, 4, 8)
        extents = {"batch": Extent.fixed(1), "frames": Extent(1, 2, 3), "height": side, "width": side}
        profile = profile_of(graph, extents)
        plan = write_plan(folder / f"{name}.plan", BUNDLE.path_of(name), [profile], memory=size, **said)  # type: ignore[arg-type]  # as above
        outputs = [output.name for output in graph.outputs if output.name != "pixels"]
        kept = [output for output in outputs if "cache" in output]
        engines.append(TensorRTEngine(plan, trt, cuda, outputs=outputs, kept=kept, memory=memory))
    return engines[0], engines[1], memory


def small_plan(folder: Path, profiles: list[dict[str, Any]] | None = None, **said: Any) -> Path:
    """`y` is twice `x` plus `offset`, `[batch, 2]`."""
    nodes = [helper.make_node("Add", ["x", "x"], ["twice"]), helper.make_node("Add", ["twice", "offset"], ["y"])]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy"]
    offset = numpy_helper.from_array(np.zeros(2, np.float32), "offset")
    graph = helper.make_graph(nodes, "small", tensors[:1], tensors[1:], [offset])
    path = folder / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return write_plan(folder / "small.plan", path, profiles or [{"x": [[1, 2], [2, 2], [4, 2]]}], **said)


def batch(rows: int) -> Any:
    return RNG.standard_normal((rows, 2)).astype(np.float32)


def test_chunks_are_decoded_without_their_state_leaving_the_device(
    tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    first, following, _ = decoders(tmp_path, trt, cuda)
    expected = [
        OnnxRuntimeEngine(BUNDLE.path_of(name), outputs=engine.outputs)
        for name, engine in (("decoder_first", first), ("decoder_next", following))  # type: ignore[arg-type]  # as above
    ]
    latents = RNG.standard_normal((1, CHANNELS, 7, 4, 4)).astype(np.float32)
    states: list[dict[str, Any]] = [{}, {}]
    addresses = []
    for start, stop in ((0, 1), (1, 4), (4, 6), (6, 7)):
        frames = []
        for which, engines in enumerate(((first, following), expected)):
            outputs = engines[start > 0].run({"latents": latents[:, :, start:stop], **states[which]})
            frames.append(outputs.pop("frames"))
            states[which] = {"cache_" + name.split("cache_")[1]: value for name, value in outputs.items()}
        np.testing.assert_array_equal(*frames)
        assert all(isinstance(value, torch.Tensor) for value in states[0].values())
        addresses.append({name: value.data_ptr() for name, value in states[0].items()})
        # What was given out last is bound as it is: no copy was made of it.
        bound = dict(trt.called("set_tensor_address"))
        assert all(bound[f"next_{name}" if start else name] == address for name, address in addresses[-1].items())
        if len(addresses) > 1:
            assert all(bound[name] == address for name, address in addresses[-2].items())
    for name, value in states[1].items():
        np.testing.assert_array_equal(states[0][name].numpy(), value)


def test_engines_share_memory_as_large_as_the_largest_needs(tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    first, following, memory = decoders(tmp_path, trt, cuda)
    assert memory.bytes == 300
    assert trt.called("create_execution_context") == [("USER_MANAGED",)] * 2
    latents = RNG.standard_normal((1, CHANNELS, 1, 4, 4)).astype(np.float32)
    state = first.run({"latents": latents})
    state.pop("frames")
    following.run({"latents": latents, **state})
    assert trt.called("set_device_memory") == [(memory.address(cuda), 300)] * 2
    # A third that needs more moves it; those before it are told at their next call.
    memory.reserve(5000)
    first.run({"latents": latents})
    assert trt.called("set_device_memory")[-1] == (memory.address(cuda), 5000)


def test_the_first_profile_that_fits_is_used(tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    plan = small_plan(tmp_path, [{"x": [[2, 2]] * 3}, {"x": [[1, 2], [1, 2], [9, 2]]}])
    engine = TensorRTEngine(plan, trt, cuda)
    for rows in (2, 2, 9, 1, 2):
        x = batch(rows)
        np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x)
    assert [index for index, _ in trt.called("set_optimization_profile_async")] == [0, 1, 0]
    with pytest.raises(EngineError, match=r"small.plan: the plan has no profile for .*\(10, 2\).* --size"):
        engine.run({"x": batch(10)})
    assert {stream for *_, stream in trt.called("execute_async_v3")} == {STREAM}


def test_a_shape_that_comes_again_is_captured(tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    engine = TensorRTEngine(small_plan(tmp_path), trt, cuda, graphs=2, kept=["y"])
    outputs = []
    for rows, captured, executed in [(1, 0, 1), (1, 1, 3), (1, 1, 3), (2, 1, 4), (3, 1, 5), (2, 2, 7), (3, 2, 9)]:
        x = batch(rows)
        outputs.append((x, engine.run({"x": x})["y"]))
        assert engine.captured == captured
        # A capture takes one call that warms up and one that is recorded; a replay takes none.
        assert len(trt.called("execute_async_v3")) == executed
    # Kept outputs are no views of buffers that a later replay writes.
    for x, y in outputs:
        np.testing.assert_array_equal(y.numpy(), 2 * x)
    # Each graph has a context of its own; one row's was the least recently used.
    assert len(trt.called("create_execution_context")) == 4
    engine.run({"x": batch(1)})
    assert len(trt.called("execute_async_v3")) == 11


def test_graphs_are_captured_anew_when_the_memory_moved(tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    memory = SharedMemory()
    engine = TensorRTEngine(small_plan(tmp_path, memory=64), trt, cuda, graphs=1, memory=memory)
    for _ in range(3):
        engine.run({"x": batch(2)})
    before = len(trt.called("execute_async_v3"))
    memory.reserve(1000)
    x = batch(2)
    np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x)
    assert len(trt.called("execute_async_v3")) == before + 2
    assert trt.called("set_device_memory")[-1][1] == 1000


def test_what_cannot_be_captured_runs_all_the_same(tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    engine = TensorRTEngine(small_plan(tmp_path, capturable=False), trt, cuda, graphs=2)
    for _ in range(4):
        x = batch(2)
        np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x)
    assert engine.captured == 0
    # It is tried once.
    assert len(trt.called("create_execution_context")) == 2


def test_refitting_changes_weights_between_calls(tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    engine = TensorRTEngine(small_plan(tmp_path, refittable=True), trt, cuda, graphs=1)
    x = batch(2)
    for _ in range(2):
        engine.run({"x": x})
    assert engine.captured == 1
    engine.refit({"offset": np.array([1, -1], np.float32)})
    assert engine.captured == 0
    np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x + np.array([1, -1], np.float32))
    for weights, message in [
        ({"onset": np.zeros(2, np.float32)}, "has no weights onset"),
        ({"offset": np.zeros(3, np.float32)}, r"takes no float32 \[3\] as offset"),
        ({"offset": np.zeros(2, np.float16)}, r"takes no float16 \[2\] as offset"),
    ]:
        with pytest.raises(EngineError, match=message):
            engine.refit(weights)
    fixed = TensorRTEngine(small_plan(tmp_path), trt, cuda)
    with pytest.raises(EngineError, match="can't be refitted: build the plan with `rushes export tensorrt --refit`"):
        fixed.refit({})


def test_a_plan_with_streamable_weights_gets_a_budget_before_its_contexts(
    tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    TensorRTEngine(small_plan(tmp_path, streamable=1000), trt, cuda)
    assert trt.calls == [("weight_streaming_budget_v2", 500), ("create_execution_context", "USER_MANAGED")]


def test_a_plan_that_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    (tmp_path / "old.plan").write_bytes(b"ftrt\xff")
    with pytest.raises(EngineError, match="magic tag does not match; build it again with `rushes export") as caught:
        TensorRTEngine(tmp_path / "old.plan", trt, cuda)
    assert str(caught.value).startswith("old.plan: tensorrt 11.4.0 does not load the plan")
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match=r"none.plan: can't be read"):
        TensorRTEngine(tmp_path / "none.plan", trt, cuda)
    with pytest.raises(EngineError, match="no output z; it has y"):
        TensorRTEngine(small_plan(tmp_path), trt, cuda, outputs=["z"])


def test_what_does_not_fit_the_graph_is_refused_before_it_is_bound(
    tmp_path: Path, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    engine = TensorRTEngine(small_plan(tmp_path), trt, cuda)
    for feeds, message in [
        ({"z": batch(1)}, "takes x, not z"),
        ({"x": batch(1).astype(np.float64)}, "x must be float32"),
        ({"x": batch(1)[0]}, "x must be float32"),
        ({"x": torch.zeros(1, 2, dtype=torch.int64)}, "not int64"),
    ]:
        with pytest.raises(EngineError, match=message):
            engine.run(feeds)
    assert trt.called("set_tensor_address") == []
    turned = np.ascontiguousarray(batch(2).T).T
    np.testing.assert_array_equal(engine.run({"x": turned})["y"], 2 * turned)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(EngineError, match=r"need a GPU, and torch .* sees none"):
        Cuda()

"""ONNX graphs to TensorRT plans: profiles from a graph's symbolic shapes, and the strongly typed build.

Works with `tensorrt` 10 and 11, which need a GPU to build for it, and with `tensorrt_rtx`, which is on PyPI and also
builds on a machine without one, for a compute capability that is named. So CI can check that TensorRT takes what is
exported. TensorRT-RTX builds for GeForce and RTX cards (8.0, 8.6, 8.9, 12.0), not for H100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from export.onnx import ExportError
from export.shapes import size_of
from models.bundle import GraphInfo

# Everything that is only known to TensorRT by its number (8.9: Ada).
WITHOUT_GPU = (8, 9)
_ENDS = ("least", "usual", "most")


@dataclass(frozen=True)
class Extent:
    """The least, usual and largest value of a symbol in one profile."""

    least: int
    usual: int
    most: int


def profile_of(graph: GraphInfo, extents: Mapping[str, Extent]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, usual and largest shape of every input with dynamic dimensions. Raises `ExportError`."""
    sizes = [{name: getattr(extent, which) for name, extent in extents.items()} for which in _ENDS]
    return {
        tensor.name: tuple(tuple(size_of(dim, symbols) for dim in tensor.shape) for symbols in sizes)
        for tensor in graph.inputs
        if any(isinstance(dim, str) for dim in tensor.shape)
    }


def build_plan(
    runtime: ModuleType, path: Path, graph: GraphInfo, extents: Mapping[str, Extent], *, gpu: bool = True
) -> bytes:
    """Parse the ONNX file and build a plan with one profile; `runtime` is `tensorrt` or `tensorrt_rtx`.

    Without a `gpu` only `tensorrt_rtx` builds. Raises `ExportError` with what the parser or the builder said.
    """
    log = _log(runtime)
    builder = runtime.Builder(log)
    # Weak typing is gone in TensorRT 11; before that it must be asked not to be used.
    strongly = getattr(runtime.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = runtime.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        said = "; ".join(" ".join(str(parser.get_error(index)).split()) for index in range(parser.num_errors))
        raise ExportError(f"TensorRT does not take {path.name}: {said}")
    config = builder.create_builder_config()
    if not gpu:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(runtime.ComputeCapability, "SM{}{}".format(*WITHOUT_GPU)), 0)
    if shapes := profile_of(graph, extents):
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT does not build {path.name}: {log.last}")
    return bytes(plan)


def _log(runtime: ModuleType) -> Any:
    class Log(runtime.ILogger):  # type: ignore[name-defined, misc]
        """Keeps the last error, which is what a failed build leaves of its reason."""

        def __init__(self) -> None:
            super().__init__()
            self.last = "no reason was given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (runtime.ILogger.Severity.ERROR, runtime.ILogger.Severity.INTERNAL_ERROR):
                self.last = " ".join(message.split())

    return Log()

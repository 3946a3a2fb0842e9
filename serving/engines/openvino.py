"""OpenVINO's CPU plug-in behind the engine protocol: it reads the same ONNX files and needs no plans.

Its convolutions are the faster ones on x86, and on machines with AMX or AVX512-BF16 it computes in bf16.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from serving.engines.engine import Array, EngineError, Inputs, check_feeds, chosen_outputs

# As providers in the configuration: in fp32, and in bf16 where the machine has it.
OPENVINO, OPENVINO_BF16 = "openvino", "openvino_bf16"
Precision = Literal["f32", "bf16"]

_BF16 = "BF16"
_DTYPES: dict[str, type[np.generic]] = {
    "f32": np.float32,
    "f16": np.float16,
    "i64": np.int64,
    "u8": np.uint8,
}


def computes_in_bf16() -> bool:
    """Whether OpenVINO is installed and this CPU has instructions for bf16."""
    try:
        return _BF16 in _opened()[1]
    except ImportError:
        return False


class OpenVinoEngine:
    """One ONNX file, compiled for this CPU when it is opened (a second or so for each graph).

    `threads` is the number of threads that one call computes with: a transformer's results don't depend on it, nor on
    what else is in a batch. `outputs` names the outputs to return; all of them when left out.

    Raises `EngineError` when OpenVINO isn't installed or doesn't take the graph, and for bf16 on a machine that would
    only pretend to compute in it.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        precision: Precision = "f32",
        outputs: Sequence[str] | None = None,
    ) -> None:
        self._name = path.name
        if not path.is_file():
            raise EngineError(f"{self._name}: no such file: {path}")
        try:
            core, can = _opened()
        except ImportError as error:
            raise EngineError(f"{self._name}: openvino is not installed: pip install 'rushes[openvino]'") from error
        if precision == "bf16" and _BF16 not in can:
            raise EngineError(f"{self._name}: this CPU doesn't compute in bf16, only {', '.join(can)}: use {OPENVINO}")
        options = {
            "INFERENCE_NUM_THREADS": threads,
            # One call at a time, with all the threads: the stage decides what shares a call.
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
            # A replica is bound to cores by whoever starts it, if by anybody: two of them must not pick the same ones.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            compiled = core.compile_model(str(path), "CPU", options)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise EngineError(f"{self._name}: could not be loaded by OpenVINO: {said}") from error
        self._inputs = {
            port.get_any_name(): (
                np.dtype(_DTYPES[port.get_element_type().get_type_name()]),
                tuple(_sides(port.get_partial_shape())),
            )
            for port in compiled.inputs
        }
        known = {port.get_any_name(): port for port in compiled.outputs}
        self._outputs = chosen_outputs(self._name, list(known), outputs)
        self._ports = {name: known[name] for name in self._outputs}
        self._request = compiled.create_infer_request()

    @property
    def inputs(self) -> Inputs:
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self._name, self._inputs, feeds)
        try:
            # Inputs are read where they lie. Outputs are copied: the request's own buffers are the next call's too.
            held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
            results = self._request.infer(held, share_inputs=True, share_outputs=True)
            return {name: np.array(results[port]) for name, port in self._ports.items()}
        except RuntimeError as error:
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            said = " ".join(str(error).split())
            raise EngineError(f"{self._name}: failed on {shapes}: {said}") from error


def _opened() -> tuple[Any, Sequence[str]]:
    """OpenVINO's core, and what this CPU can do. Raises `ImportError`."""
    core: Any = importlib.import_module("openvino").Core()
    return core, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _sides(shape: Any) -> list[int | str]:
    """A dimension that isn't fixed has no name here, as ONNX Runtime's has."""
    return [side.get_length() if side.is_static else "?" for side in shape]

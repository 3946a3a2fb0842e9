"""ONNX Runtime behind the engine protocol."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serving.engines.engine import Array, EngineError, Inputs, check_feeds, chosen_outputs

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}
_ERRORS_ONLY = 3
# What ONNX Runtime leaves on the CPU on purpose: arithmetic with shapes, a few numbers a call. Nothing with weights.
_SHAPE_OPS = {
    *("Shape", "Size", "Gather", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Slice", "Flatten", "Transpose"),
    *("Cast", "Constant", "ConstantOfShape", "Range", "Identity", "Expand", "Where", "Equal", "Greater", "Less"),
    *("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Neg", "Floor", "Ceil", "ReduceProd"),
}


class OnnxRuntimeEngine:
    """One ONNX file on one execution provider.

    `threads` is the number of threads that one call computes with: a transformer's results don't depend on it, but the
    last bits of a convolution may. `outputs` names the outputs to compute and fetch; all of them when left out.
    `context_dir` is where TensorRT's provider keeps the engine that it builds (an EP-context file), which takes
    minutes; without it every start builds again.

    Raises `EngineError` when the file can't be loaded, when the provider asked for isn't the one in use or leaves work
    to the CPU, and for names that the graph doesn't have.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        provider: str = CPU,
        outputs: Sequence[str] | None = None,
        context_dir: Path | None = None,
    ) -> None:
        self._name = path.name
        if not path.is_file():
            raise EngineError(f"{self._name}: no such file: {path}")
        if provider not in ort.get_available_providers():
            raise EngineError(
                f"{self._name}: this onnxruntime has no {provider}, only {', '.join(ort.get_available_providers())}"
            )
        context = context_file(path, context_dir) if provider == TENSORRT and context_dir is not None else None
        source = context if context is not None and context.is_file() else path
        # What ONNX Runtime prints about a fallback is said here, as an error.
        with contextlib.redirect_stdout(io.StringIO()):
            if provider in (CUDA, TENSORRT) and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA's libraries where pip put them
            try:
                self._session = ort.InferenceSession(
                    str(source), _options(threads, provider), providers=providers(provider, context)
                )
            except Exception as error:  # ORT's exceptions share no base class but this one
                said = " ".join(str(error).split())
                raise EngineError(f"{self._name}: could not be loaded on {provider}: {said}") from error
        # A provider that can't start (no driver, no GPU) is left out with a line on stderr and nothing else.
        in_use = self._session.get_providers()
        if in_use[0] != provider:
            raise EngineError(f"{self._name}: {provider} was asked for but did not start; onnxruntime offers {in_use}")
        self._session.disable_fallback()
        if left := self._left_to_the_cpu(provider):
            raise EngineError(f"{self._name}: {provider} leaves {', '.join(left)} to the CPU: use another provider")
        self._inputs = {
            i.name: (np.dtype(_DTYPES[i.type]), tuple(d if d is not None else "?" for d in i.shape))
            for i in self._session.get_inputs()
        }
        known = [o.name for o in self._session.get_outputs()]
        self._outputs = chosen_outputs(self._name, known, outputs)

    @property
    def inputs(self) -> Inputs:
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self._name, self._inputs, feeds)
        try:
            binding = self._session.io_binding()
            # Bound by address: the arrays must stay alive, and be contiguous, until the call returns.
            held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
            for name, array in held.items():
                binding.bind_cpu_input(name, array)
            for name in self._outputs:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))
        except Exception as error:
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise EngineError(f"{self._name}: failed on {shapes}: {error}") from error

    def _left_to_the_cpu(self, provider: str) -> list[str]:
        """Kinds of nodes that another provider doesn't compute, but for arithmetic with shapes."""
        if provider == CPU:
            return []
        parts = self._session.get_provider_graph_assignment_info()
        on_cpu = {node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes()}
        return sorted(on_cpu - _SHAPE_OPS)


def providers(provider: str, context: Path | None = None) -> list[str | tuple[str, dict[str, str]]]:
    """What ONNX Runtime is asked for. `context` is the EP-context file to write, unless it is there already."""
    # The bundle's proof is for fp32, not for TF32.
    cuda = (CUDA, {"use_tf32": "0"})
    if provider == CUDA:
        return [cuda]
    if provider != TENSORRT:
        return [provider]
    options: dict[str, str] = {}
    if context is not None and not context.is_file():
        context.parent.mkdir(parents=True, exist_ok=True)
        options = {
            "trt_engine_cache_enable": "1",
            "trt_timing_cache_enable": "1",
            "trt_dump_ep_context_model": "1",
            "trt_ep_context_file_path": str(context),
            # The engine beside the file: inside it, 2 GiB would be the end.
            "trt_ep_context_embed_mode": "0",
        }
    return [(TENSORRT, options), cuda]


def context_file(graph: Path, folder: Path) -> Path:
    """The EP-context file of a graph. Engines fit one version of ONNX Runtime, which is built for one TensorRT."""
    return folder / f"{graph.stem}-ort{ort.__version__}_ctx.onnx"


def _options(threads: int, provider: str) -> ort.SessionOptions:
    options = ort.SessionOptions()
    if provider == TENSORRT:
        # TensorRT takes a whole graph, shapes and all; CUDA stands in for what it refuses.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads that spin while they wait take the core from the other engines in this machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _ERRORS_ONLY
    return options

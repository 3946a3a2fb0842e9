"""ONNX Runtime behind the engine protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.engines.engine import Array, EngineError

CPU = "CPUExecutionProvider"

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}
_ERRORS_ONLY = 3


class OnnxRuntimeEngine:
    """One ONNX file on one execution provider.

    `threads` is the number of threads that one call computes with (its results don't depend on it). `outputs` names the
    outputs to compute and fetch; all of them when left out.

    Raises `EngineError` when the file can't be loaded, when the provider asked for isn't the one in use, and for names
    that the graph doesn't have.
    """

    def __init__(
        self, path: Path, *, threads: int = 1, provider: str = CPU, outputs: Sequence[str] | None = None
    ) -> None:
        self._name = path.name
        if not path.is_file():
            raise EngineError(f"{self._name}: no such file: {path}")
        if provider not in ort.get_available_providers():
            raise EngineError(
                f"{self._name}: this onnxruntime has no {provider}, only {', '.join(ort.get_available_providers())}"
            )
        try:
            self._session = ort.InferenceSession(str(path), _options(threads), providers=[provider])
        except Exception as error:  # ORT's exceptions share no base class but this one
            raise EngineError(f"{self._name}: could not be loaded: {error}") from error
        # A provider that can't start (no driver, no GPU) is left out with a line on stderr and nothing else.
        in_use = self._session.get_providers()
        if in_use[0] != provider:
            raise EngineError(f"{self._name}: {provider} was asked for but did not start; onnxruntime offers {in_use}")
        self._session.disable_fallback()
        self._inputs = {
            i.name: (np.dtype(_DTYPES[i.type]), tuple(d if d is not None else "?" for d in i.shape))
            for i in self._session.get_inputs()
        }
        known = [o.name for o in self._session.get_outputs()]
        self._outputs = tuple(known if outputs is None else outputs)
        if missing := [o for o in self._outputs if o not in known]:
            raise EngineError(f"{self._name}: no output {', '.join(missing)}; it has {', '.join(known)}")

    @property
    def inputs(self) -> Mapping[str, tuple[np.dtype[Any], tuple[int | str, ...]]]:
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._check(feeds)
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

    def _check(self, feeds: Mapping[str, Array]) -> None:
        """Binding skips checks that `InferenceSession.run` makes: a wrong dtype would be read as another's bytes."""
        if feeds.keys() != self._inputs.keys():
            raise EngineError(f"{self._name}: takes {', '.join(self._inputs)}, not {', '.join(feeds)}")
        for name, (dtype, shape) in self._inputs.items():
            fed = feeds[name]
            fits = len(fed.shape) == len(shape) and all(
                isinstance(want, str) or want == have for want, have in zip(shape, fed.shape, strict=True)
            )
            if fed.dtype != dtype or not fits:
                raise EngineError(
                    f"{self._name}: {name} must be {dtype} {list(shape)}, not {fed.dtype} {list(fed.shape)}"
                )


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads that spin while they wait take the core from the other engines in this machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _ERRORS_ONLY
    return options

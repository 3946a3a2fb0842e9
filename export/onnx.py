"""One torch module to one ONNX graph, cleaned of everything that belongs to the machine it was made on."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxscript.rewriter import pattern

from models.bundle import TensorInfo
from models.graph import Graph

# Opset 23's Attention is no faster in ONNX Runtime, and TensorRT-RTX refuses it in fp32.
OPSET = 20
# Smaller tensors stay inside the graph's own file, where shape inference can see them.
EXTERNAL_BYTES = 1024
# ONNX Runtime maps an initialiser straight from the file when it starts on a page.
ALIGNMENT = 4096
# So many values of a tensor are looked at before all of them are.
_PROBE = 4096


def _rooted(op: Any, x: Any, mean_square: Any) -> Any:
    return op.Mul(x, op.Reciprocal(op.Sqrt(mean_square)))


def _divided(op: Any, x: Any, mean_square: Any) -> Any:
    return op.Div(x, op.Sqrt(mean_square))


# `rsqrt` as ONNX Runtime knows it: an RMS norm is one kernel then, where it was seven.
_RULES = pattern.RewriteRuleSet([pattern.RewriteRule(_rooted, _divided)], commute=True)


class ExportError(RuntimeError):
    """The checkpoint can't be made into a bundle; nothing was written."""


class WeightFile:
    """An external data file; graphs that share weights share one, and equal tensors are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0

    def add(self, data: bytes | memoryview) -> tuple[int, int]:
        """Store bytes; returns their offset and length."""
        key, size = hashlib.sha256(data).digest(), len(data)
        if key not in self._places:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-self._end % ALIGNMENT if size >= ALIGNMENT else -self._end % 64))
                offset = file.tell()
                file.write(data)
                self._end = file.tell()
            self._places[key] = (offset, size)
        return self._places[key]

    def add_array(self, array: NDArray[Any]) -> tuple[int, int, bool]:
        """Store an array's little-endian bytes; the third value says that they are fp16 where fp32 was given.

        That is done where it loses nothing: a checkpoint saved in fp16 makes a bundle of the same size.
        """
        array = np.ascontiguousarray(array)
        half = array.dtype == np.float32 and _fits_half(array.reshape(-1)[:_PROBE]) and _fits_half(array)
        if half:
            array = array.astype(np.float16)
        raw: Any = array.reshape(-1).view(np.uint8)
        return *self.add(memoryview(raw)), half


def export_graph(graph: Graph, weights: WeightFile) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Write `graph.file` beside its weight file; returns its inputs and outputs. Raises `ExportError`."""
    program = _trace(graph).model
    _RULES.apply_to_model(program)
    halved = _store(program, graph, weights)
    # Without the weights, which are in their file by now: no protobuf holds more than 2 GiB.
    model = onnx_ir.to_proto(program)
    clean(model)
    _widen(model, halved)
    onnx.save(model, weights.path.parent / graph.file)
    return _tensors(model.graph.input), _tensors(model.graph.output)


def _store(program: Any, graph: Graph, weights: WeightFile) -> set[str]:
    """Write each large initialiser straight from torch's memory, or from the checkpoint's file if it is only there.

    Returns the names of those that are kept in fp16.
    """
    halved = set()
    missing = set(graph.stored.places.values()) if graph.stored is not None else set()
    for name, value in program.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < EXTERNAL_BYTES:
            continue
        array = tensor.numpy()
        if graph.stored is not None:
            try:
                found = graph.stored.find(array)
            except (OSError, ValueError) as error:
                raise ExportError(f"The {graph.name} can't be exported without verification: {error}.") from error
            if found is not None:
                missing.discard(found[0])
                array = found[1]
        offset, length, half = weights.add_array(array)
        if half:
            halved.add(name)
        value.const_value = onnx_ir.ExternalTensor(
            weights.path.name, offset, length, tensor.dtype, shape=tensor.shape, name=name, base_dir=weights.path.parent
        )
    if missing:
        raise ExportError(
            f"The {graph.name} can't be exported without verification: it lost the weight {min(missing)}."
        )
    return halved


def _trace(graph: Graph) -> Any:
    # no_grad: with gradients on, the sdpa attention of transformers' T5 does not decompose.
    with quiet(), torch.no_grad(), graph.exportable:
        try:
            return torch.onnx.export(
                graph.module,
                tuple(graph.example.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(graph.example),
                output_names=list(graph.outputs),
                dynamic_shapes=graph.dynamic_shapes,
                verbose=False,
            )
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ExportError(f"The {graph.name} can't be exported: {reason[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """torch and the quantisers tell at length what they skip; what matters is checked afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def clean(model: onnx.ModelProto) -> None:
    """Drop stack traces, source paths and inferred shapes: size, privacy, and quantisers that trip over the shapes."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    model.doc_string = graph.doc_string = ""
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""


def move_weights(model: onnx.ModelProto, folder: Path, weights: WeightFile) -> None:
    """The large initialisers of a graph that was saved in `folder` go to the weight file."""
    halved = set()
    for tensor in model.graph.initializer:
        data = _bytes_of(tensor, folder)
        if data is None:
            continue
        if tensor.data_type == TensorProto.FLOAT:
            offset, length, half = weights.add_array(np.frombuffer(data, np.float32))
            if half:
                halved.add(tensor.name)
        else:
            offset, length = weights.add(data)
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    _widen(model, halved)


def _widen(model: onnx.ModelProto, halved: set[str]) -> None:
    """A Cast for each weight that is kept in fp16, so that the graph computes in fp32; ORT folds it on loading."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name not in halved:
            continue
        name, tensor.name = tensor.name, f"{tensor.name}.fp16"
        tensor.data_type = TensorProto.FLOAT16
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _fits_half(array: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(array.astype(np.float16).astype(np.float32), array)


def _bytes_of(tensor: Any, folder: Path) -> bytes | None:
    """A tensor's little-endian bytes, or None when it is small enough to stay where it is."""
    if tensor.data_location == TensorProto.EXTERNAL:
        place = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / place["location"]).open("rb") as file:
            file.seek(int(place.get("offset", 0)), os.SEEK_SET)
            data: bytes = file.read(int(place["length"]))
        if len(data) < EXTERNAL_BYTES:
            tensor.raw_data = data
            del tensor.external_data[:]
            tensor.data_location = TensorProto.DEFAULT
            return None
        return data
    return bytes(tensor.raw_data) if len(tensor.raw_data) >= EXTERNAL_BYTES else None


def _tensors(values: Any) -> tuple[TensorInfo, ...]:
    return tuple(_tensor(value) for value in values)


def _tensor(value: Any) -> TensorInfo:
    kind = value.type.tensor_type
    return TensorInfo(
        name=value.name,
        dtype=np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name,
        shape=tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim),
    )


def leaks(model: onnx.ModelProto) -> Iterator[str]:
    """Metadata left in a graph; a bundle has none."""
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer):
        yield from (entry.key for entry in part.metadata_props)
        if part.doc_string:
            yield part.doc_string

"""One torch module to one ONNX graph, cleaned of everything that belongs to the machine it was made on."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from models.bundle import TensorInfo
from models.graph import Graph

# Opset 23's Attention is no faster in ONNX Runtime, and TensorRT-RTX refuses it in fp32.
OPSET = 20
# Smaller tensors stay inside the graph's own file, where shape inference can see them.
EXTERNAL_BYTES = 1024
# ONNX Runtime maps an initialiser straight from the file when it starts on a page.
ALIGNMENT = 4096


class ExportError(RuntimeError):
    """The checkpoint can't be made into a bundle; nothing was written."""


class WeightFile:
    """An external data file; graphs that share weights share one, and equal tensors are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0

    def add(self, data: bytes) -> tuple[int, int]:
        """Store bytes; returns their offset and length."""
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-self._end % ALIGNMENT if len(data) >= ALIGNMENT else -self._end % 64))
                offset = file.tell()
                file.write(data)
                self._end = file.tell()
            self._places[key] = (offset, len(data))
        return self._places[key]


def export_graph(graph: Graph, weights: WeightFile) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Write `graph.file` beside its weight file; returns its inputs and outputs. Raises `ExportError`."""
    with TemporaryDirectory(dir=weights.path.parent) as scratch:
        raw = Path(scratch) / "graph.onnx"
        _trace(graph).save(raw, external_data=True)
        # Without the weights: a model above 2 GiB doesn't fit into one protobuf.
        model = onnx.load(raw, load_external_data=False)
        clean(model)
        move_weights(model, raw.parent, weights)
    onnx.save(model, weights.path.parent / graph.file)
    return _tensors(model.graph.input), _tensors(model.graph.output)


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
    """Large initialisers go to the weight file: as fp16 with a Cast where that loses nothing; ORT folds it on loading.

    A checkpoint saved in fp16 thus makes a bundle of the same size that still computes in fp32.
    """
    casts = []
    for tensor in model.graph.initializer:
        data = _bytes_of(tensor, folder)
        if data is None:
            continue
        if tensor.data_type == TensorProto.FLOAT:
            exact = np.frombuffer(data, np.float32)
            with np.errstate(over="ignore"):
                half = exact.astype(np.float16)
            if np.array_equal(half.astype(np.float32), exact):
                data = half.tobytes()
                casts.append(
                    helper.make_node(
                        "Cast", [f"{tensor.name}.fp16"], [tensor.name], f"{tensor.name}.cast", to=TensorProto.FLOAT
                    )
                )
                tensor.name = f"{tensor.name}.fp16"
                tensor.data_type = TensorProto.FLOAT16
        offset, length = weights.add(data)
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


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

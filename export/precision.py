"""A bundle in another precision: the core of `rushes quantize`. The fp32 bundle stays the master that proves it.

Embeddings of time, norms, softmax, RoPE and the projection that writes the velocity keep fp32: they are a thousandth of
the work, and rounding errors there go straight into every step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from export import parity
from export.onnx import ExportError, WeightFile, clean, move_weights, quiet
from export.proof import compare, render, rollout_calls
from export.shapes import size_of
from export.workspace import replaced
from models.bundle import (
    MANIFEST,
    Bundle,
    FileInfo,
    GraphInfo,
    GraphName,
    Manifest,
    Precision,
    PrecisionInfo,
    ProofInfo,
    sha256_of,
)

Progress = Callable[[str], None]
Array = NDArray[Any]

TRANSFORMERS: tuple[GraphName, ...] = ("text_encoder", "denoiser", "denoiser_2")
DECODERS: tuple[GraphName, ...] = ("decoder_first", "decoder_next")
# Weights of less than this make up for no quantiser's overhead.
LEAST_WEIGHT = 64 * 64
# Normalisation as it is exported, position tables and attention's softmax.
_FP32_OPS = (
    "LayerNormalization",
    "ReduceMean",
    "ReduceL2",
    "Pow",
    "Sqrt",
    "Reciprocal",
    "Div",
    "Softmax",
    "Sin",
    "Cos",
)
# Rollouts that calibrate static ranges, and how much of them.
_PROMPTS = (
    "a small blue cube spinning on a green floor at noon",
    "a large red ball moving left on a sand floor at sunset, the camera pans left",
    "a small yellow cone bouncing left of a large white cylinder on a navy floor at night",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which graphs a precision changes, how, and the PSNR in dB below which the result is refused as broken."""

    graphs: tuple[GraphName, ...]
    convert: Callable[[onnx.ModelProto, Path, Sequence[Mapping[str, Array]]], onnx.ModelProto]
    least_psnr: float
    calibrated: bool = False


def quantize(master: Bundle, output: Path, precision: Precision, progress: Progress = lambda line: None) -> Bundle:
    """Write `master` in another precision to `output`. A bundle that is already there is replaced.

    Raises `ExportError`, for a master that isn't fp32 and for a result that is far from it; then nothing is written.
    """
    if master.manifest.precision is not None:
        raise ExportError(f"{master.root} is {master.manifest.precision.name} already: start from the fp32 bundle.")
    recipe = RECIPES[precision]
    master.verify()
    with replaced(output) as folder:
        _write(master, folder, precision, recipe, progress)
    return Bundle.load(output)


def _write(master: Bundle, folder: Path, precision: Precision, recipe: Recipe, progress: Progress) -> None:
    manifest = master.manifest
    changed = [name for name in manifest.graphs if name in recipe.graphs]
    kept = {manifest.graphs[name].file for name in manifest.graphs if name not in changed}
    for name in _files_of(master, kept):
        shutil.copyfile(master.root / name, folder / name)
    calls: Mapping[GraphName, Sequence[Mapping[str, Array]]] = {}
    if recipe.calibrated:
        progress("Collecting inputs from rollouts")
        calls = rollout_calls(manifest, master.root, _PROMPTS)
    graphs = dict(manifest.graphs)
    weights: dict[str, WeightFile] = {}
    for name in changed:
        progress(f"Converting {name}")
        start = time.perf_counter()
        info = manifest.graphs[name]
        place = f"{name.removesuffix('_first').removesuffix('_next')}.weights"
        file = weights.setdefault(place, WeightFile(folder / place))
        with TemporaryDirectory(dir=folder) as scratch, quiet():
            model = recipe.convert(load(master.path_of(name)), Path(scratch), calls.get(name, ()))
            clean(model)
            move_weights(model, Path(scratch), file)
        onnx.save(model, folder / info.file)
        progress(f"Comparing {name}")
        largest, mean = differences(master.path_of(name), folder / info.file, info)
        graphs[name] = info.model_copy(
            update={"parity": largest, "mean_error": mean, "seconds": round(time.perf_counter() - start, 2)}
        )
    files = {
        path.name: FileInfo(sha256=sha256_of(path), bytes=path.stat().st_size) for path in sorted(folder.iterdir())
    }
    made = manifest.model_copy(
        update={
            "graphs": graphs,
            "files": files,
            "precision": PrecisionInfo(name=precision, master=master.digest),
            "proof": None,
        }
    )
    progress("Comparing a whole video")
    made = made.model_copy(update={"proof": _prove(master, made, folder, recipe)})
    (folder / MANIFEST).write_text(made.model_dump_json(indent=1, exclude_none=True) + "\n")


def _prove(master: Bundle, made: Manifest, folder: Path, recipe: Recipe) -> ProofInfo:
    start = time.perf_counter()
    expected, take = render(master.manifest, master.root)
    frames, _ = render(made, folder)
    psnr, worst = compare(frames, expected)
    if not psnr >= recipe.least_psnr:
        raise ExportError(
            f"A whole video differs from the fp32 bundle's: {psnr:.1f} dB, and {recipe.least_psnr:.0f} are needed."
        )
    return ProofInfo(
        reference="the fp32 bundle",
        size=take.size,
        frames=take.frames,
        steps=take.steps,
        psnr_db=round(psnr, 2),
        worst_frame_psnr_db=round(worst, 2),
        seconds=round(time.perf_counter() - start, 2),
    )


def load(path: Path) -> onnx.ModelProto:
    """A graph with its weights inside, as fp32 initialisers again where a Cast makes them so."""
    model = onnx.load(path)
    graph = model.graph
    initialisers = {tensor.name: tensor for tensor in graph.initializer}
    casts = [
        node
        for node in graph.node
        if node.op_type == "Cast"
        and node.input[0] in initialisers
        and initialisers[node.input[0]].data_type == TensorProto.FLOAT16
        and node.attribute[0].i == TensorProto.FLOAT
    ]
    for node in casts:
        half = initialisers[node.input[0]]
        values = numpy_helper.to_array(half).astype(np.float32)
        half.CopyFrom(numpy_helper.from_array(values, node.output[0]))
        graph.node.remove(node)
    return model


def differences(master: Path, made: Path, info: GraphInfo) -> tuple[dict[str, float], dict[str, float]]:
    """Largest and mean absolute error by output against the master graph, at the shapes it was verified at."""
    before, after = parity.open_session(master), parity.open_session(made)
    rng = np.random.default_rng(5)
    names = [tensor.name for tensor in info.outputs]
    largest, total, count = (dict.fromkeys(names, 0.0) for _ in range(3))
    for shapes in info.verified_shapes:
        feeds = {tensor.name: _feed(tensor.name, tensor.dtype, shapes, info, rng) for tensor in info.inputs}
        for name, wanted, got in zip(names, before.run(names, feeds), after.run(names, feeds), strict=True):
            if got.shape != wanted.shape:
                raise ExportError(f"{made.name}: {name} is {got.shape} instead of {wanted.shape}.")
            error = np.abs(got.astype(np.float64) - wanted)
            largest[name] = max(largest[name], float(error.max(initial=0.0)))
            total[name] += float(error.sum())
            count[name] += error.size
    if not info.verified_shapes:
        return {}, {}
    return largest, {name: total[name] / max(1, count[name]) for name in names}


def _feed(
    name: str, dtype: str, shapes: Mapping[str, Sequence[int]], info: GraphInfo, rng: np.random.Generator
) -> Array:
    """Something plausible for an input at one of the verified shapes."""
    shape = shapes.get(name) or _cache_shape(name, shapes, info)
    match name:
        case "attention_mask":
            return np.ones(shape, dtype)
        case "timestep":
            return rng.uniform(1, 999, shape).astype(dtype)
        case _ if dtype == "int64":
            return np.ones(shape, dtype)
        case _:
            return rng.standard_normal(shape).astype(dtype)


def _cache_shape(name: str, shapes: Mapping[str, Sequence[int]], info: GraphInfo) -> tuple[int, ...]:
    """Caches aren't among the verified shapes: their symbols are those of the other inputs."""
    known: dict[str, int] = {}
    for tensor in info.inputs:
        for symbol, size in zip(tensor.shape, shapes.get(tensor.name, ()), strict=False):
            if isinstance(symbol, str):
                known[symbol] = size
    tensor = next(tensor for tensor in info.inputs if tensor.name == name)
    return tuple(size_of(dim, known) for dim in tensor.shape)


def _files_of(bundle: Bundle, graphs: set[str]) -> Iterator[str]:
    """The files that these graphs need, and the tokenizer."""
    yield bundle.manifest.text.tokenizer
    needed = set(graphs)
    for file in graphs:
        model = onnx.load(bundle.root / file, load_external_data=False)
        for tensor in model.graph.initializer:
            needed |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    yield from sorted(needed)


def _weighted(model: onnx.ModelProto, ops: Sequence[str]) -> list[str]:
    """Nodes whose second input is a weight large enough, but not the last of them, which writes the output.

    Raises `ExportError` when there are none: to the quantisers an empty list would mean all nodes.
    """
    large = {
        tensor.name
        for tensor in model.graph.initializer
        if int(np.prod(tensor.dims)) >= LEAST_WEIGHT and not _is_rotation(numpy_helper.to_array(tensor))
    }
    named = [node.name for node in model.graph.node if node.op_type in ops and node.input[1] in large]
    if len(named) < 2:
        raise ExportError(f"{model.graph.name} has no matrices that are large enough to quantize.")
    return named[:-1]


def _is_rotation(weight: Array) -> bool:
    """Whether it is RoPE's quarter turn, which is no weight and loses nothing: one 1 or -1 in each row."""
    return bool(
        np.all(np.count_nonzero(weight.reshape(len(weight), -1), axis=1) == 1) and set(np.unique(weight)) <= {-1, 0, 1}
    )


def _fp16(model: onnx.ModelProto, _: Path, __: Sequence[Mapping[str, Array]]) -> onnx.ModelProto:
    blocked = [*DEFAULT_OP_BLOCK_LIST, *_FP32_OPS]
    # The time embedding's products have two dimensions, and are the only ones that come out as Gemm.
    timed = [node.name for node in model.graph.node if node.op_type == "Gemm"]
    half: onnx.ModelProto = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=blocked, node_block_list=timed
    )
    # The converter writes a cast once for each node that wants it, under the same name.
    once = {node.output[0]: node for node in reversed(half.graph.node)}
    nodes = [node for node in half.graph.node if once[node.output[0]] is node]
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    return half


def _dynamic(model: onnx.ModelProto, scratch: Path, __: Sequence[Mapping[str, Array]]) -> onnx.ModelProto:
    nodes = _weighted(model, ["MatMul"])  # before it is saved, which takes the weights out of it
    quantize_dynamic(
        _saved(model, scratch),
        scratch / "made.onnx",
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=nodes,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    return onnx.load(scratch / "made.onnx")


def _static(model: onnx.ModelProto, scratch: Path, calls: Sequence[Mapping[str, Array]]) -> onnx.ModelProto:
    nodes = _weighted(model, ["MatMul"])  # before it is saved, which takes the weights out of it
    quantize_static(
        _saved(model, scratch),
        scratch / "made.onnx",
        _Recorded(calls),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=nodes,
        per_channel=True,
        # TensorRT takes no other: signed, and with its zero in the middle.
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "ActivationSymmetric": True},
    )
    return onnx.load(scratch / "made.onnx")


def _weights_only(bits: int, model: onnx.ModelProto, _: Path, __: Sequence[Mapping[str, Array]]) -> onnx.ModelProto:
    kept = set(_weighted(model, ["MatMul"]))
    others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in kept]
    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=32, is_symmetric=True, accuracy_level=4, nodes_to_exclude=others
    )
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made


class _Recorded(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, calls: Sequence[Mapping[str, Array]]) -> None:
        self._calls = iter(calls)

    def get_next(self) -> dict[str, Array] | None:
        call = next(self._calls, None)
        return None if call is None else dict(call)


def _saved(model: onnx.ModelProto, scratch: Path) -> Path:
    """For quantisers that want a file; their own large-model handling wants one too."""
    path = scratch / "given.onnx"
    onnx.save(model, path, save_as_external_data=True, location="given.weights")
    return path


RECIPES: dict[Precision, Recipe] = {
    "fp16": Recipe((*TRANSFORMERS, *DECODERS), _fp16, least_psnr=35),
    "int8": Recipe(TRANSFORMERS, _dynamic, least_psnr=20),
    "int8-static": Recipe(TRANSFORMERS, _static, least_psnr=15, calibrated=True),
    "int8-weights": Recipe(TRANSFORMERS, partial(_weights_only, 8), least_psnr=30),
    "int4-weights": Recipe(TRANSFORMERS, partial(_weights_only, 4), least_psnr=15),
}

"""ONNX graphs to TensorRT plans: the core of `rushes export tensorrt`.

Works with `tensorrt` 10 and 11, which need a GPU to build for it, and with `tensorrt_rtx`, which is on PyPI and also
builds on a machine without one, for a compute capability that is named. So CI can check that TensorRT takes what is
exported. TensorRT-RTX builds for GeForce and RTX cards (8.0, 8.6, 8.9, 12.0), not for H100.

Networks are strongly typed: TensorRT 11 knows no others, and the precision is then what the bundle was proven with.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from export.onnx import ExportError
from export.profiles import DEFAULT_ROWS, profiles_of
from models.bundle import SERVED_GRAPHS, Bundle, GraphName
from models.plans import (
    Flag,
    PlanBasis,
    PlanInfo,
    Profile,
    RuntimeName,
    gpu_name,
    graph_digest,
    open_log,
    store_plan,
    stored_plan,
    write_whole,
)

Progress = Callable[[str], None]

_INSTALL: dict[RuntimeName, str] = {
    "tensorrt": "TensorRT is not installed: pip install 'rushes[tensorrt]', on a machine that reaches NVIDIA's package "
    "index; or choose --runtime tensorrt_rtx (GeForce and RTX cards), which is on PyPI.",
    "tensorrt_rtx": "TensorRT-RTX is not installed: pip install tensorrt-rtx.",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A TensorRT and the GPU that plans are for. Without a `device`, it is only named, by its compute capability."""

    name: RuntimeName
    runtime: ModuleType
    gpu: str
    device: bool

    @property
    def version(self) -> str:
        return str(self.runtime.__version__)


def open_target(name: RuntimeName, compute_capability: str | None = None) -> Target:
    """The TensorRT that is installed, and the GPU that is here. Raises `ExportError`, which says what is missing.

    `compute_capability`, such as 8.9, is for `tensorrt_rtx` alone: its plans fit every card that has it.
    """
    try:
        runtime = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: its libraries aren't there, or don't fit
        raise ExportError(_INSTALL[name] + ("" if isinstance(error, ModuleNotFoundError) else f" ({error})")) from error
    if name == "tensorrt_rtx":
        if compute_capability is None:
            raise ExportError("TensorRT-RTX needs to know what for: say it, as in --compute-capability 8.9.")
        number = re.sub(r"\D", "", compute_capability)
        known = sorted(kind.removeprefix("SM") for kind in runtime.ComputeCapability.__members__ if kind[-1].isdigit())
        if number not in known:
            dotted = ", ".join(f"{k[:-1]}.{k[-1]}" for k in known)
            raise ExportError(f"TensorRT-RTX builds for {dotted}, not {compute_capability}.")
        return Target(name, runtime, f"sm{number}", device=False)
    if compute_capability is not None:
        raise ExportError("TensorRT builds for the GPU that is here: leave --compute-capability out.")
    import torch

    if not torch.cuda.is_available():
        raise ExportError("TensorRT builds for the GPU of this machine, and torch sees none.")
    return Target(
        name, runtime, gpu_name(torch.cuda.get_device_name(), torch.cuda.get_device_capability()), device=True
    )


def export_plans(
    bundle: Bundle,
    target: Target,
    cache: Path,
    *,
    graphs: Sequence[GraphName] = SERVED_GRAPHS,
    sizes: Sequence[tuple[int, int]] = (),
    any_size: bool = True,
    rows: int = DEFAULT_ROWS,
    flags: Sequence[Flag] = (),
    progress: Progress = lambda line: None,
) -> list[Path]:
    """A plan for each of the bundle's graphs, in `cache`; one that is there already is left as it is.

    Other graphs than the served ones are small, and stay on the CPU. Raises `ExportError`; plans that were finished
    before stay.
    """
    bundle.verify()
    made = []
    for name in graphs:
        if name not in bundle.manifest.graphs:
            continue
        basis = PlanBasis(
            graph=name,
            graph_sha256=graph_digest(bundle, name),
            runtime=target.name,
            version=target.version,
            gpu=target.gpu,
            profiles=profiles_of(bundle.manifest, name, sizes, any_size=any_size, rows=rows),
            flags=tuple(sorted(flags)),
        )
        if (path := stored_plan(cache, basis)) is None:
            progress(f"Building {name} for {target.gpu}")
            path = _build(bundle, name, basis, target, cache)
        made.append(path)
    return made


def build_plan(
    target: Target, path: Path, profiles: Sequence[Profile], flags: Sequence[Flag] = (), *, timing: Path | None = None
) -> bytes:
    """Parse the ONNX file and build a plan. Raises `ExportError` with what the parser or the builder said.

    `timing` is a file of measured kernels: read if it is there, and written again with what was measured now.
    """
    runtime = target.runtime
    log = open_log(runtime)
    builder = runtime.Builder(log)
    # Weak typing is gone in TensorRT 11; before that it must be asked not to be used.
    strongly = getattr(runtime.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = runtime.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        said = "; ".join(" ".join(str(parser.get_error(index)).split()) for index in range(parser.num_errors))
        raise ExportError(f"TensorRT does not take {path.name}: {said}")
    config = builder.create_builder_config()
    # On by default; without it fp32 is what the bundle's proof says.
    config.clear_flag(runtime.BuilderFlag.TF32)
    for flag in flags:
        config.set_flag(getattr(runtime.BuilderFlag, flag.upper()))
    if not target.device:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(runtime.ComputeCapability, target.gpu.upper()), 0)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, ends in shapes.items():
            profile.set_shape(name, *ends)
        config.add_optimization_profile(profile)
    # Without a device there is nothing to measure with.
    timings = config.create_timing_cache(_read(timing)) if timing is not None and target.device else None
    if timings is not None:
        config.set_timing_cache(timings, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT does not build {path.name}: {log.last}")
    if timings is not None and timing is not None:
        write_whole(timing, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _build(bundle: Bundle, name: GraphName, basis: PlanBasis, target: Target, cache: Path) -> Path:
    start = time.perf_counter()
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{target.name}-{target.version}-{target.gpu}")
    plan = build_plan(target, bundle.path_of(name), basis.profiles, basis.flags, timing=cache / f"{slug}.timing")
    seconds = round(time.perf_counter() - start, 2)
    info = PlanInfo(
        basis=basis,
        bundle=bundle.manifest.name,
        bytes=len(plan),
        sha256=hashlib.sha256(plan).hexdigest(),
        seconds=seconds,
    )
    return store_plan(cache, info, plan)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""

"""Bundles: `rushes export`, `measure`, `quantize` and `inspect`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

from serving.cli.terminal import BAD_INPUT, console, fail, plain, said_in_one_line
from serving.config import ConfigError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A diffusers checkpoint, such as WanPipeline's layout.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The bundle's directory; a bundle that is there is replaced.")
    ],
    verify: Annotated[
        bool,
        typer.Option(help="Run every graph against torch at other shapes, and a whole video against diffusers."),
    ] = True,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PART=]PATH[:SCALE]",
            help="A LoRA to merge into the denoiser, and how much of it; may be given several times. PART is "
            "transformer_2 for one that belongs to the second expert.",
        ),
    ] = None,
    named_lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=[PART=]PATH[:SCALE]",
            help="A LoRA that is kept apart from the weights, for requests to name; may be given several times.",
        ),
    ] = None,
) -> None:
    """Turn a diffusers checkpoint into a bundle, and prove the bundle equal to it. One that fails is not written.

    `rushes export tensorrt BUNDLE` is another command.
    """
    try:
        from export.checkpoint import export_checkpoint
        from export.lora import Adapter
        from export.named_lora import NamedLora
        from export.onnx import ExportError
    except ImportError as error:
        fail(f"{error.name} is missing: pip install 'rushes[export]'", BAD_INPUT)
    with said_in_one_line():
        with console.status("exporting") as status:
            try:
                export_checkpoint(
                    checkpoint,
                    output,
                    progress=lambda said: status.update(plain(said)),
                    verify=verify,
                    adapters=[Adapter.parse(text) for text in lora or ()],
                    loras=NamedLora.parse(named_lora or ()),
                )
            except ExportError as error:
                fail(str(error), BAD_INPUT)
        print(output)


class Runtime(StrEnum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


def export_tensorrt(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")],
    cache: Annotated[
        Path | None, typer.Option(help="Where plans are kept.", show_default="BUNDLE/plans", metavar="DIR")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT to build fast kernels for; may be repeated. The default size when left out."),
    ] = None,
    any_size: Annotated[bool, typer.Option(help="Also build for every other size within the model's limits.")] = True,
    rows: Annotated[int, typer.Option(min=1, help="The denoiser's largest batch, as `denoiser.max_rows`.")] = 8,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be changed in the loaded engine.")] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights can stay in host memory: for models beyond the GPU's.")
    ] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="Faster fp32, with the mantissa of fp16.")] = False,
    graph: Annotated[list[str] | None, typer.Option(help="Build this graph alone; may be repeated.")] = None,
    runtime: Annotated[Runtime, typer.Option(help="tensorrt_rtx is for GeForce and RTX cards.")] = Runtime.tensorrt,
    compute_capability: Annotated[
        str | None, typer.Option(help="For tensorrt_rtx, which needs no GPU to build: such as 8.9.")
    ] = None,
) -> None:
    """Build TensorRT plans of a bundle's graphs, for the GPU of this machine; prints where each one is."""
    from models.bundle import SERVED_GRAPHS
    from models.bundle import Bundle as LoadedBundle
    from models.plans import PLANS

    try:
        from export.onnx import ExportError
        from export.tensorrt import export_plans, open_target
    except ImportError as error:
        fail(f"{error.name} is missing: pip install 'rushes[export]'", BAD_INPUT)
    if unknown := [name for name in graph or () if name not in SERVED_GRAPHS]:
        fail(f"--graph must be one of {', '.join(SERVED_GRAPHS)}, not {unknown[0]!r}", BAD_INPUT)
    flags = [name for name, on in (("refit", refit), ("weight_streaming", weight_streaming), ("tf32", tf32)) if on]
    with said_in_one_line(), console.status("building") as status:
        sizes = [_size(text) for text in size or ()]
        try:
            plans = export_plans(
                LoadedBundle.load(bundle),
                open_target(runtime.value, compute_capability),
                cache or bundle / PLANS,
                graphs=[name for name in SERVED_GRAPHS if graph is None or name in graph],
                sizes=sizes,
                any_size=any_size,
                rows=rows,
                flags=cast(Any, flags),
                progress=lambda said: status.update(plain(said)),
            )
        except ExportError as error:
            fail(str(error), BAD_INPUT)
    for plan in plans:
        print(plan)


def measure(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory; its manifest is written anew.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads for an engine call, as the service will have.")] = 1,
    provider: Annotated[str, typer.Option(help="As in the configuration.")] = "CPUExecutionProvider",
) -> None:
    """Measure what a bundle's graphs take on this machine, and keep that in the bundle.

    A service tells by it how long a video will take before it has made one. Its digest becomes another.
    """
    from models.bundle import Bundle as LoadedBundle
    from serving import measuring

    with said_in_one_line():
        loaded = LoadedBundle.load(bundle)
        loaded.verify()
        with console.status("measuring") as status:
            cost = measuring.measure(
                loaded, threads=threads, provider=provider, progress=lambda said: status.update(plain(said))
            )
        measuring.write(loaded, cost)
        console.print(f"within {100 * cost.worst_error:.0f} % of {len(cost.calls_measured)} calls, {cost.device}")
        print(bundle)


def quantize(
    bundle: Annotated[Path, typer.Argument(help="An fp32 bundle's directory.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The new bundle's directory; a bundle that is there is replaced.")
    ],
    precision: Annotated[
        str,
        typer.Option(
            help="fp16 (for GPUs), int8 (activations by what comes), int8-static (by calibration), int8-weights, "
            "int4-weights."
        ),
    ] = "int8",
) -> None:
    """Make a smaller bundle of an fp32 one, and compare both graph by graph and on a whole video."""
    from models.bundle import Bundle as LoadedBundle
    from models.bundle import Precision

    try:
        from export.onnx import ExportError
        from export.precision import quantize as quantize_bundle
    except ImportError as error:
        fail(f"{error.name} is missing: pip install 'rushes[export]'", BAD_INPUT)
    if precision not in get_args(Precision):
        fail(f"--precision must be one of {', '.join(get_args(Precision))}, not {precision!r}", BAD_INPUT)
    with said_in_one_line():
        with console.status("converting") as status:
            try:
                quantize_bundle(
                    LoadedBundle.load(bundle),
                    output,
                    cast(Precision, precision),
                    progress=lambda said: status.update(plain(said)),
                )
            except ExportError as error:
                fail(str(error), BAD_INPUT)
        print(output)


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")],
    json: Annotated[bool, typer.Option("--json", help="The manifest as JSON, for programs.")] = False,
) -> None:
    """Check a bundle's files, and say what it holds and how it was proven."""
    from models.bundle import Bundle as LoadedBundle
    from serving.inspection import describe

    with said_in_one_line():
        loaded = LoadedBundle.load(bundle)
        loaded.verify()
        if json:
            print(loaded.manifest.model_dump_json(indent=1, exclude_none=True))
        else:
            describe(loaded, Console(highlight=False))


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size must be WIDTHxHEIGHT, not {text!r}")
    return int(width), int(height)

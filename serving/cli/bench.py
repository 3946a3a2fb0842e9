"""`rushes bench`: the engines alone, the peers, and all of it for BENCHMARKS.md; `load` has a file of its own."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.terminal import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    Config,
    console,
    fail,
    output_file,
    plain,
    said_in_one_line,
)
from serving.config import BUNDLED, MINI_BUNDLE, ConfigError, ServiceConfig, load_config

if TYPE_CHECKING:
    from serving.bench.suite import Results

CHECKPOINT = MINI_BUNDLE.parent / "checkpoint"


Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")]
Seconds = Annotated[int | None, typer.Option(min=1, help="Length of each video.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="How strictly to follow the prompt; 1 is unguided.")]
Json = Annotated[Path | None, typer.Option("--output", "-o", help="Write everything as JSON to this file.")]
Times = Annotated[int, typer.Option(min=1, help="How often each figure is measured.")]


def engines(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")] = MINI_BUNDLE,
    size: Size = None,
    seconds: Seconds = None,
    steps: Steps = None,
    guidance: Guidance = None,
    config: Config = None,
    times: Times = 3,
    output: Json = None,
    plots: Annotated[Path | None, typer.Option(help="Write a plot into this directory, as PNG.")] = None,
) -> None:
    """Time each engine alone at a request's shapes, and a whole request with nothing around the engines: the limit.

    Engines are opened as --config says that a service opens them; prints Markdown.
    """
    from models.bundle import Bundle
    from serving.bench.engines import default_spec, engines_table, time_engines
    from serving.bench.machine import this_machine
    from serving.bench.plots import check_plots, plot_bars

    with said_of_a_benchmark():
        if output is not None:
            output_file(output)
        if plots is not None:
            check_plots()
            plots.mkdir(parents=True, exist_ok=True)
        loaded = Bundle.load(bundle)
        loaded.verify()
        spec = default_spec(loaded, size=size, seconds=seconds, num_inference_steps=steps, guidance_scale=guidance)
        taken = time_engines(loaded, spec, config_of(config), times=times, say=_say)
        print(engines_table(taken))
        if output is not None:
            values = {"machine": asdict(this_machine()), "engines": taken.as_json()}
            output.write_text(json.dumps(values, indent=1) + "\n")
        if plots is not None:
            names = [f"{one.what}, {one.rows} row{'s' if one.rows > 1 else ''}" for one in taken.calls]
            medians = [one.seconds.median for one in taken.calls]
            console.print(plain(str(plot_bars(names, medians, "seconds", plots / "engines.png"))))


def peers(
    checkpoint: Annotated[Path, typer.Argument(help="A WanPipeline checkpoint with a rushes.json.")] = CHECKPOINT,
    size: Size = None,
    seconds: Seconds = None,
    steps: Steps = None,
    guidance: Guidance = None,
    compiled: Annotated[bool, typer.Option(help="torch.compile too, where there is a C++ compiler.")] = True,
    times: Times = 3,
    output: Json = None,
) -> None:
    """Time diffusers' WanPipeline alone and behind a plain FastAPI queue: fp32, bf16 on a CPU that has it, and the
    faster one compiled.

    Prints Markdown. `rushes bench report` sets these against a service in the same run.
    """
    import asyncio

    from serving.bench import peers as others
    from serving.bench.asks import asks
    from serving.bench.machine import this_machine

    with said_of_a_benchmark():
        if why := others.why_not():
            fail(why, BAD_INPUT)
        if not (checkpoint / "model_index.json").is_file():
            raise ConfigError(f"there is no checkpoint at {checkpoint}")
        if output is not None:
            output_file(output)
        body = {"size": size, "seconds": seconds, "num_inference_steps": steps, "guidance_scale": guidance}
        (ask,) = asks(1, body)
        taken: list[others.PeerTimes] = []

        def run(variant: others.Variant) -> None:
            _say(f"starting diffusers {variant.name}")
            with others.running(checkpoint, variant) as peer:
                taken.append(asyncio.run(others.time_peer(peer, ask, times=times, say=_say)))

        with _ended_by_sigterm():
            for variant in others.variants(this_machine().flags):
                run(variant)
            if compiled and others.can_compile():
                run(others.faster(taken))
            elif compiled:
                _say("there is no C++ compiler, so nothing is compiled")
        print(others.peers_table(taken))
        if output is not None:
            values = {"machine": asdict(this_machine()), "peers": [one.as_json() for one in taken]}
            output.write_text(json.dumps(values, indent=1) + "\n")


def report(
    bundle: Annotated[Path, typer.Option(help="A bidirectional bundle.")] = MINI_BUNDLE,
    causal_bundle: Annotated[Path, typer.Option(help="A causal bundle.")] = BUNDLED["mini-causal"],
    checkpoint: Annotated[
        Path, typer.Option(help="The checkpoint of --bundle, for the peers, which are left out where there is none.")
    ] = CHECKPOINT,
    with_peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Whether to run diffusers.")] = True,
    config: Config = None,
    rounds: Times = 5,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where report.json and report.md go.")] = Path("."),
    write: Annotated[Path | None, typer.Option(help="The document to fill in, such as BENCHMARKS.md.")] = None,
) -> None:
    """Measure every figure of BENCHMARKS.md on this machine, beside the bare engines and diffusers, in one run.

    It starts a service of its own, as --config says but for the models. With nothing else on the machine it takes some
    ten minutes on two cores; what is measured by then is in report.json at any time.
    """
    from models.bundle import Bundle
    from serving.bench.document import DocumentError, filled
    from serving.bench.suite import Options, progress, run

    with said_of_a_benchmark():
        loaded = [Bundle.load(path) for path in (bundle, causal_bundle)]
        for one in loaded:
            one.verify()
        causal = loaded[1]
        if loaded[0].manifest.rollout == "causal" or causal.manifest.rollout != "causal":
            raise ConfigError("--bundle must be bidirectional, and --causal-bundle causal")
        if causal.manifest.name == loaded[0].manifest.name:
            raise ConfigError("the two bundles have the same name, so one service can't serve both")
        output.mkdir(parents=True, exist_ok=True)
        given = checkpoint if with_peers and (checkpoint / "model_index.json").is_file() else None
        document = write.read_text(encoding="utf-8") if write is not None else ""

        def save(results: Results) -> None:
            (output / "report.json").write_text(results.as_json() + "\n")
            (output / "report.md").write_text("\n\n".join(results.parts().values()) + "\n")

        with _ended_by_sigterm():
            results = run(Options(loaded[0], causal, given, config_of(config), rounds), progress(_say), save)
        parts = results.parts()
        print(parts["figures"])
        if write is not None:
            try:
                write.write_text(filled(document, parts), encoding="utf-8")
            except DocumentError as error:
                fail(f"{write}: {error}; the tables are in {output / 'report.md'}", FAILED)


@contextmanager
def said_of_a_benchmark() -> Iterator[None]:
    """As `said_in_one_line`, and what is wrong with a trace, with prompts or with an installation."""
    from serving.bench.arrivals import TraceError
    from serving.bench.plots import NoPlots

    with said_in_one_line():
        try:
            yield
        except (TraceError, NoPlots) as error:
            fail(str(error), BAD_INPUT)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C: servers that were started are stopped."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def config_of(path: Path | None) -> ServiceConfig:
    return load_config(path) if path is not None else ServiceConfig()


def _say(line: str) -> None:
    console.print(line, markup=False)

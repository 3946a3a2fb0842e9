"""`rushes bench load`: any server with the Videos API under load."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.bench import Guidance, Json, Seconds, Size, Steps, config_of, said_of_a_benchmark
from serving.cli.terminal import DEFAULT_URL, FAILED, ApiKey, Config, Url, console, fail, output_file, plain
from serving.config import ConfigError

if TYPE_CHECKING:
    from serving.bench.asks import Arrival, Ask
    from serving.bench.following import Outcome, Target
    from serving.bench.observed import Counts


class Follow(StrEnum):
    stream = "stream"
    watch = "watch"
    poll = "poll"


def load(
    url: Url = DEFAULT_URL,
    follow: Annotated[
        Follow,
        typer.Option(
            help="stream: the answer to the POST is the video. watch: a job, and then its /stream. Both are for "
            "Rushes. poll: a job that is asked about, on any server with the Videos API."
        ),
    ] = Follow.stream,
    form: Annotated[
        bool, typer.Option("--form", help="Send multipart forms, as the openai SDK does, instead of JSON.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option(help="Requests in a second, as a Poisson process: nobody waits for an answer.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="So many requests at a time instead.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Arrivals from this file instead: a JSON object a line with at_seconds and any of prompt, model, "
            "size, seconds, num_inference_steps, guidance_scale, negative_prompt, seed, priority, label and fields.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="How many, without a trace.")] = 16,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line, taken in turn.")] = None,
    model: Annotated[str | None, typer.Option(help="The model; the server's default when left out.")] = None,
    size: Size = None,
    seconds: Seconds = None,
    steps: Steps = None,
    guidance: Guidance = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help="Another field of every request; may be repeated.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="The first request's seed and the arrivals'; -1 sends no seeds.", min=-1)
    ] = 0,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before, one by one, that aren't counted.")] = 1,
    slo_seconds: Annotated[float | None, typer.Option(help="The goal for a request's latency.")] = None,
    slo_first_chunk_seconds: Annotated[float | None, typer.Option(help="The goal for its first chunk.")] = None,
    startup_seconds: Annotated[float, typer.Option(min=0, help="What a viewer holds before the start.")] = 1.0,
    timeout_seconds: Annotated[float, typer.Option(min=0.1, help="When a request is given up.")] = 600.0,
    poll_seconds: Annotated[float, typer.Option(min=0.001, help="How often --follow poll asks.")] = 0.1,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="The bundle that is served on this machine: says what its engines need of the first request's "
            "latency, and how busy they were."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The /metrics page of a Rushes service (`observability.metrics_port`): says how busy its stages were. "
            "It reports with a delay, so this takes half a minute more.",
        ),
    ] = None,
    config: Config = None,
    api_key: ApiKey = None,
    output: Json = None,
    plots: Annotated[Path | None, typer.Option(help="Write plots into this directory, as PNG.")] = None,
) -> None:
    """Send requests to a server with the Videos API, and say how it did; prints Markdown.

    Latencies count from when a request should have been sent. The exit code is 1 when any request failed.
    """
    import asyncio

    from models.bundle import Bundle
    from serving.bench.breakdown import breakdown_table, explained_each, occupancy, occupancy_table
    from serving.bench.following import Follow as Following
    from serving.bench.following import Target
    from serving.bench.machine import this_machine
    from serving.bench.observed import between, observed_table, settled
    from serving.bench.plots import check_plots, plot_load
    from serving.bench.report import Goals, report
    from serving.bench.tables import load_table

    with said_of_a_benchmark():
        if sum(given is not None for given in (rate, concurrency, trace)) > 1:
            raise ConfigError("--rate, --concurrency and --trace exclude each other")
        if rate is not None and rate <= 0:
            raise ConfigError(f"--rate must be positive, not {rate}")
        body = {
            "model": model,
            "size": size,
            "seconds": None if seconds is None else str(seconds),
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            **dict(map(_field, field or ())),
        }
        arrivals, warming = _arrivals(rate, trace, requests, prompts, body, None if seed < 0 else seed, warm_up)
        if output is not None:
            output_file(output)
        if plots is not None:
            check_plots()
            plots.mkdir(parents=True, exist_ok=True)

        async def measured() -> tuple[list[Outcome], Counts | None, Counts | None]:
            async with Target(
                url,
                Following(follow.value),
                api_key=api_key,
                timeout_seconds=timeout_seconds,
                poll_seconds=poll_seconds,
                form=form,
            ) as target:
                await _warmed_up(target, warming)
                before = None if metrics is None else await settled(metrics)
                outcomes = await _measured(target, arrivals, concurrency)
                return outcomes, before, None if metrics is None else await settled(metrics)

        outcomes, before, after = asyncio.run(measured())
        told = report(outcomes, Goals(slo_seconds, slo_first_chunk_seconds, startup_seconds))
        print(load_table(told))
        observed = None
        if before is not None and after is not None:
            observed = between(
                before,
                after,
                wall_seconds=told.wall_seconds,
                completed=told.completed,
                latency_seconds=None if told.latency is None else told.latency.mean,
            )
            print(f"\n{observed_table(observed)}")
        parts = None
        if bundle is not None:
            parts = asyncio.run(explained_each(Bundle.load(bundle), config_of(config), outcomes))
        if parts:
            print(f"\n{breakdown_table(parts[0])}\n\n{occupancy_table(occupancy(parts, told.wall_seconds))}")
        if output is not None:
            values = {
                "machine": asdict(this_machine()),
                "url": url,
                "follow": follow.value,
                "report": asdict(told),
                "breakdown": {**asdict(parts[0]), "rest": parts[0].rest} if parts else None,
                "occupancy": occupancy(parts, told.wall_seconds) if parts else None,
                "observed": None if observed is None else asdict(observed),
                "outcomes": [asdict(outcome) for outcome in outcomes],
            }
            output.write_text(json.dumps(values, indent=1) + "\n")
        for path in plot_load(outcomes, plots) if plots is not None else ():
            console.print(plain(str(path)))
    if told.errors:
        hint = "; --follow poll is for servers that can't stream" if follow is not Follow.poll else ""
        fail(f"{told.requests - told.completed} of {told.requests} requests failed{hint}", FAILED)


def _arrivals(
    rate: float | None,
    trace: Path | None,
    requests: int,
    prompts: Path | None,
    body: dict[str, Any],
    seed: int | None,
    warm_up: int,
) -> tuple[list[Arrival], list[Ask]]:
    """What is measured, and what is sent before: the first of it with other seeds. All at once without a rate."""
    from serving.bench.arrivals import at_once, poisson, read_trace
    from serving.bench.asks import PROMPTS, Ask, asks, read_prompts

    texts: tuple[str, ...] | list[str] = PROMPTS
    if prompts is not None:
        try:
            texts = read_prompts(prompts)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if trace is not None:
        arrivals = read_trace(trace, prompts=texts, seed=seed)
    else:
        made = asks(requests, body, prompts=texts, seed=seed)
        arrivals = at_once(made) if rate is None else poisson(made, rate, seed=seed or 0)
    first = [arrival.ask for arrival in arrivals]
    others = [{**ask.body, **({} if seed is None else {"seed": 1 << 30})} for ask in first]
    return arrivals, [Ask(others[number % len(others)]) for number in range(warm_up)]


async def _warmed_up(target: Target, warming: list[Ask]) -> None:
    """Raises `OSError` when nobody is there."""
    with console.status("warming up"):
        for ask in warming:
            if (await target.make(ask)).error == "no connection":
                raise OSError("the server can't be reached")


async def _measured(target: Target, arrivals: list[Arrival], concurrency: int | None) -> list[Outcome]:
    from serving.bench.load import closed_loop, open_loop

    ended = 0

    def told(outcome: Outcome) -> None:
        nonlocal ended
        ended += 1
        status.update(f"{ended} of {len(arrivals)} have ended")

    with console.status(f"0 of {len(arrivals)} have ended") as status:
        if concurrency is None:
            return await open_loop(target, arrivals, told)
        return await closed_loop(target, [arrival.ask for arrival in arrivals], concurrency, told)


def _field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise ConfigError(f"--field must be NAME=JSON, such as best_of=2, not {text!r}") from None

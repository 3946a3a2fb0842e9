"""What is measured of a bidirectional model: one request against the bare engines, and the service full of requests."""

from __future__ import annotations

from collections.abc import Sequence

from serving.bench.arrivals import at_once
from serving.bench.asks import Arrival, Ask
from serving.bench.bench import Bench, idle
from serving.bench.breakdown import Breakdown, explained
from serving.bench.calls import Engines, replay, saturate
from serving.bench.engines import default_spec
from serving.bench.figures import MIXED, ONE_REQUEST, THROUGHPUT, Measured
from serving.bench.following import Target
from serving.bench.load import closed_loop, open_loop
from serving.bench.peers import Peer, completed
from serving.bench.report import report
from serving.bench.statistics import Spread, steady_rate

STEPS = 20
SECONDS = 2
# One long request for three short ones, the long ones first in line.
_MIX = ("long", "short", "short", "short") * 4
_MIX_SECONDS = {"long": 4, "short": 1}


async def one_request(bench: Bench) -> tuple[list[Measured], Breakdown]:
    """Bare and over HTTP by turns, so that whatever else the machine does is in both."""
    manifest, seconds = bench.bundle.manifest, bench.seconds(SECONDS)
    spec = default_spec(bench.bundle, seconds=seconds, num_inference_steps=STEPS)
    video = await Engines(bench.bundle, bench.config).record(spec)
    ratios, latencies = [], []
    async with bench.target() as target:
        warm_up, *requests = bench.asks(bench.rounds + 1, seconds=seconds, num_inference_steps=STEPS)
        completed(await target.make(warm_up))
        for number, ask in enumerate(requests):
            bench.say(f"one request, {number + 1} of {bench.rounds}")
            bare = replay(video)[-1]
            latencies.append(completed(await target.make(ask)).latency_seconds)
            ratios.append(latencies[-1] / bare)
    note = f"{spec.frames} frames of {spec.width}x{spec.height}, from sending to the end of the stream"
    told = explained(video, Spread.of(latencies).median, manifest.fps)
    return [Measured(ONE_REQUEST, Spread.of(ratios), note)], told


async def throughput(bench: Bench) -> list[Measured]:
    """Twice as many requests at a time as one call holds, without the filling up and the running out."""
    config, seconds = bench.config, bench.seconds(1)
    spec = default_spec(bench.bundle, seconds=seconds, num_inference_steps=STEPS)
    rows, guided = config.denoiser.max_rows, spec.guidance_scale > 1
    batch = rows // (2 if guided else 1)
    denoisers, decoders = (stage.autoscaling.max_replicas for stage in (config.denoiser, config.decoder))
    concurrency = 2 * batch * denoisers
    replicas = [await Engines(bench.bundle, config).record(spec) for _ in range(max(denoisers, decoders))]
    ratios = []
    async with bench.target() as target:
        for number in range(min(bench.rounds, 2)):
            bench.say(f"saturation, {number + 1} of {min(bench.rounds, 2)}: the engines alone")
            bare = steady_rate(
                saturate(replicas, rows=rows, denoisers=denoisers, decoders=decoders, batches=4), batch * denoisers
            )
            bench.say(f"saturation, {number + 1} of {min(bench.rounds, 2)}: {concurrency} requests at a time")
            requests = bench.asks(4 * concurrency, seconds=seconds, num_inference_steps=STEPS)
            outcomes = [completed(outcome) for outcome in await closed_loop(target, requests, concurrency)]
            ratios.append(steady_rate([outcome.ended for outcome in outcomes], concurrency) / bare)
    note = f"{spec.frames} frames, {concurrency} at a time, {rows} rows a call, {denoisers} denoiser(s)"
    return [Measured(THROUGHPUT, Spread.of(ratios), note)]


def mix(bench: Bench) -> list[Arrival]:
    """Sixteen requests at once: every fourth is four times as long as the others."""
    made = bench.asks(len(_MIX), num_inference_steps=STEPS)
    return at_once(
        [
            Ask({**ask.body, "seconds": bench.seconds(_MIX_SECONDS[label])}, label)
            for ask, label in zip(made, _MIX, strict=True)
        ]
    )


async def mixed(bench: Bench) -> list[float]:
    """The P95 latency of the short ones, for each round, in seconds."""
    taken = []
    async with bench.target() as target:
        for number in range(min(bench.rounds, 2)):
            bench.say(f"16 mixed requests, {number + 1} of {min(bench.rounds, 2)}")
            await idle(target)
            taken.append(await _short_p95(target, mix(bench)))
    return taken


async def mixed_by_a_peer(bench: Bench, peer: Peer) -> float:
    """The same of diffusers behind its queue, once: it takes the sum of all requests. Each shape is warm before."""
    arrivals = mix(bench)
    async with peer.target() as target:
        for label in _MIX_SECONDS:
            bench.say(f"diffusers {peer.variant.name}: warming up for {label} requests")
            await peer.alone(target, next(arrival.ask for arrival in arrivals if arrival.ask.label == label))
        bench.say(f"diffusers {peer.variant.name}: 16 mixed requests, one after another")
        return await _short_p95(target, arrivals)


def mixed_figure(ours: Sequence[float], theirs: float, variant: str) -> Measured:
    note = (
        f"12 of {_MIX_SECONDS['short']} s and 4 of {_MIX_SECONDS['long']} s at once; the queue runs diffusers {variant}"
    )
    return Measured(MIXED, Spread.of([theirs / one for one in ours]), note)


async def _short_p95(target: Target, arrivals: Sequence[Arrival]) -> float:
    outcomes = [completed(outcome) for outcome in await open_loop(target, arrivals)]
    short = report(outcomes).labels["short"].latency
    assert short is not None
    return short.p95

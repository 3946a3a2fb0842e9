"""All figures in one run, for BENCHMARKS.md: a service of its own, the bare engines and the peers, by turns.

Every figure is a ratio or a difference of two things measured within the same minute. What fails, or can't be measured
here, is a line that says why, and nothing else is lost by it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from models.bundle import Bundle
from serving.bench import peers, scenarios, streaming
from serving.bench.bench import Bench, Say
from serving.bench.breakdown import Breakdown, breakdown_table
from serving.bench.engines import EngineTimes, default_spec, engines_table, time_engines
from serving.bench.figures import (
    ALL,
    BESIDE_BATCH,
    CHUNK_OVERHEAD,
    CLIP_LENGTH,
    FIRST_CHUNK,
    MIXED,
    ONE_REQUEST,
    PEER_BEST,
    PEER_EAGER,
    REAL_TIME,
    THROUGHPUT,
    VIEWERS,
    Figure,
    Measured,
    figures_table,
)
from serving.bench.machine import Machine, rows, this_machine
from serving.bench.peers import Peer, PeerTimes, completed
from serving.bench.processes import service, settings_of
from serving.bench.statistics import Spread
from serving.bench.tables import table
from serving.client.errors import RushesError
from serving.config import ServiceConfig
from serving.deployments.local import free_port
from serving.engines.engine import EngineError

_T = TypeVar("_T")
_ROWS = (1, 2, 4, 8)
# A spread of peers' requests costs more than one of ours, and they are steadier.
_PEER_ROUNDS = 3
# Where the search for how many viewers there can be begins, as a part of the real-time factor of one.
_FIRST_GUESS = 0.6


@dataclass(frozen=True, slots=True)
class Options:
    """`causal` and `checkpoint` None: what needs them is left out. `config` is the service's but for its models."""

    bundle: Bundle
    causal: Bundle | None
    checkpoint: Path | None
    config: ServiceConfig
    rounds: int = 5


@dataclass(slots=True)
class Results:
    """Of one run; `seconds` is how long it took."""

    machine: Machine
    figures: list[Measured] = field(default_factory=list)
    engines: list[EngineTimes] = field(default_factory=list)
    peers: list[PeerTimes] = field(default_factory=list)
    breakdown: Breakdown | None = None
    seconds: float = 0.0

    def as_json(self) -> str:
        values = {
            "machine": asdict(self.machine),
            "figures": [one.as_json() for one in self.figures],
            "engines": [one.as_json() for one in self.engines],
            "peers": [one.as_json() for one in self.peers],
            "breakdown": None if self.breakdown is None else {**asdict(self.breakdown), "rest": self.breakdown.rest},
            "seconds": self.seconds,
        }
        return json.dumps(values, indent=1)

    def parts(self) -> dict[str, str]:
        """The document's, by the names of their markers."""
        none = "Not measured in this run."
        return {
            "machine": table(["machine", ""], [*rows(self.machine), ("the run took", f"{self.seconds / 60:.1f} min")]),
            "figures": figures_table(self.figures),
            "breakdown": none if self.breakdown is None else breakdown_table(self.breakdown),
            "engines": "\n\n".join(map(engines_table, self.engines)) or none,
            "peers": peers.peers_table(self.peers) if self.peers else none,
        }


def run(options: Options, say: Say, save: Callable[[Results], None]) -> Results:
    """Raises `NotStarted` when the service doesn't start; whatever fails after that is in the results.

    `save` is called with what there is whenever something was measured.
    """
    run = _Run(options, Results(this_machine()), say, save)
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        for bundle in run.bundles:
            with run.covering():
                spec = default_spec(bundle)
                times = time_engines(bundle, spec, options.config, rows=_ROWS, say=say)
                run.results.engines.append(times)
        say("starting the service")
        models = {bundle.manifest.name: str(bundle.root.resolve()) for bundle in run.bundles}
        settings = {**settings_of(options.config), "models": models}
        with service(settings, Path(folder), free_port()) as url:
            run.measure_bidirectional(url)
            run.measure_causal(url)
            run.measure_peers(url)
    return run.results


class _Run:
    """The scenarios in their order; each adds to the results."""

    def __init__(self, options: Options, results: Results, say: Say, save: Callable[[Results], None]) -> None:
        self.options, self.results = options, results
        self._say, self._save = say, save
        self._started = time.monotonic()
        self.bundles = [bundle for bundle in (options.bundle, options.causal) if bundle is not None]

    def measure_bidirectional(self, url: str) -> None:
        bench = self._bench(url, self.options.bundle)
        with self.covering(ONE_REQUEST):
            measured, self.results.breakdown = self._await(scenarios.one_request(bench))
            self.results.figures += measured
        with self.covering(THROUGHPUT):
            self.results.figures += self._await(scenarios.throughput(bench))

    def measure_causal(self, url: str) -> None:
        if self.options.causal is None:
            needing = (FIRST_CHUNK, REAL_TIME, CHUNK_OVERHEAD, VIEWERS, BESIDE_BATCH, CLIP_LENGTH)
            self._left_out("it needs a causal bundle, and none was given", *needing)
            return
        bench = self._bench(url, self.options.causal)
        factor = 1.0
        with self.covering(FIRST_CHUNK, REAL_TIME, CHUNK_OVERHEAD):
            measured = self._await(streaming.one_viewer(bench))
            factor = next(one.value.median for one in measured if one.figure is REAL_TIME and one.value is not None)
            self.results.figures += measured
        with self.covering(CLIP_LENGTH):
            self.results.figures += self._await(streaming.clip_length(bench))
        count = 0
        with self.covering(VIEWERS):
            measured, count = self._await(streaming.viewers(bench, _FIRST_GUESS * factor))
            self.results.figures += measured
        with self.covering(BESIDE_BATCH):
            self.results.figures += self._await(streaming.beside_batch(bench, count))

    def measure_peers(self, url: str) -> None:
        needing = (PEER_EAGER, PEER_BEST, MIXED)
        if self.options.checkpoint is None:
            self._left_out("without a checkpoint there is nothing to run diffusers on", *needing)
            return
        if why := peers.why_not():
            self._left_out(why, *needing)
            return
        bench = self._bench(url, self.options.bundle)
        mixed: list[float] = []
        with self.covering(MIXED):  # the peer's comes last, when it is known which is the best
            mixed = self._await(scenarios.mixed(bench))
        for variant in peers.variants(self.results.machine.flags):
            self._time(bench, variant)
        if not self.results.peers:
            self._left_out("diffusers could not be run", *needing)
            return
        best = peers.faster(self.results.peers)
        if peers.can_compile():
            self._time(bench, best)
        with self.covering():
            self._against_peers()
        if mixed:
            with self.covering(MIXED):
                self.results.figures.append(self._mixed(bench, mixed))

    @contextmanager
    def covering(self, *figures: Figure) -> Iterator[None]:
        """What goes wrong in here is why these figures aren't there."""
        try:
            yield
        except (OSError, ValueError, EngineError, RushesError, httpx.HTTPError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            self._say(f"not measured: {why}")
            self._left_out(why[:300], *figures)
        order = {figure: place for place, figure in enumerate(ALL)}
        self.results.figures.sort(key=lambda one: order[one.figure])
        self.results.seconds = time.monotonic() - self._started
        self._save(self.results)

    def _time(self, bench: Bench, variant: peers.Variant) -> None:
        """One way to run diffusers; its times, with ours for the same request in the same rounds."""
        seconds = bench.seconds(scenarios.SECONDS)
        # Not a prompt that the service has met before, so that it encodes each as the peer does.
        ours = iter(bench.asks(_PEER_ROUNDS, num_inference_steps=scenarios.STEPS))

        async def measured(peer: Peer) -> PeerTimes:
            async with bench.target() as target:

                async def beside() -> float:
                    ask = next(ours)
                    prompt = f"{ask.body['prompt']}, {variant.name}"
                    body = {**ask.body, "prompt": prompt, "seconds": seconds}
                    return completed(await target.make(type(ask)(body))).latency_seconds

                (ask,) = bench.asks(1, seconds=seconds, num_inference_steps=scenarios.STEPS)
                return await peers.time_peer(peer, ask, times=_PEER_ROUNDS, beside=beside, say=bench.say)

        with self.covering():
            assert self.options.checkpoint is not None
            bench.say(f"starting diffusers {variant.name}")
            with peers.running(self.options.checkpoint, variant) as peer:
                self.results.peers.append(self._await(measured(peer)))

    def _against_peers(self) -> None:
        note = "2 s, 20 steps; theirs alone in its process, to pixels, and ours over HTTP, to the end of the stream"
        eager = next((one for one in self.results.peers if one.variant == "fp32"), None)
        if eager is None:
            self._left_out("diffusers could not be run in fp32", PEER_EAGER)
        else:
            self.results.figures.append(Measured(PEER_EAGER, _ratios(eager), note))
        best = min(self.results.peers, key=lambda one: one.best)
        tried = ", ".join(one.variant for one in self.results.peers)
        if not peers.computes_bf16(self.results.machine.flags):
            tried += " (this CPU has no bf16)"
        self.results.figures.append(Measured(PEER_BEST, _ratios(best), f"{best.variant} of {tried}; {note}"))

    def _mixed(self, bench: Bench, ours: list[float]) -> Measured:
        best = min(self.results.peers, key=lambda one: one.best)
        variant = peers.Variant(best.variant.partition(",")[0], compiled="compiled" in best.variant)
        assert self.options.checkpoint is not None
        with peers.running(self.options.checkpoint, variant) as peer:
            theirs = self._await(scenarios.mixed_by_a_peer(bench, peer))
        return scenarios.mixed_figure(ours, theirs, variant.name)

    def _bench(self, url: str, bundle: Bundle) -> Bench:
        return Bench(url, self.options.config, bundle, self.options.rounds, self._say)

    def _left_out(self, why: str, *figures: Figure) -> None:
        self.results.figures += [Measured(figure, None, why) for figure in figures]

    @staticmethod
    def _await(scenario: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run(scenario)


def _ratios(times: PeerTimes) -> Spread:
    """The peer's time over ours, round by round."""
    return Spread.of([theirs / ours for theirs, ours in zip(times.alone, times.beside, strict=True)])


def progress(say: Callable[[str], None]) -> Say:
    """Lines with the minutes and seconds since the start in front."""
    started = time.monotonic()

    def line(said: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        say(f"{minutes}:{seconds:02} {said}")

    return line

"""diffusers' pipeline beside the service, on the same checkpoint and with the same requests: `rushes bench peers`."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving.bench.asks import Ask
from serving.bench.following import Follow, Outcome, Target
from serving.bench.processes import server
from serving.bench.statistics import Spread
from serving.bench.tables import spread, table
from serving.deployments.local import free_port

Say = Callable[[str], None]
# A peer's queue is asked often: its answers cost it nothing while its one thread is in torch.
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the pipeline."""

    precision: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.precision}, compiled" if self.compiled else self.precision


@dataclass(frozen=True, slots=True)
class PeerTimes:
    """What one request took: `alone` in the pipeline, to pixels, and `queued` over HTTP and encoded. In seconds.

    `beside` is what was measured in the same rounds, such as the service's time for the same request.
    """

    variant: str
    alone: tuple[float, ...]
    queued: tuple[float, ...]
    beside: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        return Spread.of(self.alone).median

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Peer:
    """A running one."""

    def __init__(self, url: str, variant: Variant) -> None:
        self.url, self.variant = url, variant

    def target(self) -> Target:
        return Target(self.url, Follow.poll, poll_seconds=POLL_SECONDS)

    async def alone(self, target: Target, ask: Ask) -> float:
        """Seconds for one request without the queue. Raises `OSError` when it can't be made."""
        response = await target.http.post("/alone", json=dict(ask.body))
        if response.is_error:
            raise OSError(f"diffusers ({self.variant.name}) could not make it: {response.text[:200]}")
        return float(response.json()["seconds"])


def why_not() -> str | None:
    """What is missing to run the peers."""
    missing = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is missing: pip install 'rushes[export]'" if missing else None


def can_compile() -> bool:
    """`torch.compile` needs a C++ compiler for the CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@contextmanager
def running(checkpoint: Path, variant: Variant) -> Iterator[Peer]:
    """Raises `NotStarted`."""
    port = free_port()
    arguments = ["serving.bench.peer", str(checkpoint), "--precision", variant.precision, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    arguments += ["--compiled"] if variant.compiled else []
    # It keeps nothing, and would wait for its one thread to come out of torch.
    with server(arguments, url, "/openapi.json", stop_seconds=2.0):
        yield Peer(url, variant)


async def time_peer(
    peer: Peer,
    ask: Ask,
    *,
    times: int,
    beside: Callable[[], Awaitable[float]] | None = None,
    budget_seconds: float = 60.0,
    say: Say = print,
) -> PeerTimes:
    """After one request that isn't counted, which also compiles. Raises `OSError`.

    In every round the same request once alone, once queued and once as `beside` has it; no new one after
    `budget_seconds`.
    """
    rounds: list[tuple[float, float, float]] = []
    async with peer.target() as target:
        say(f"diffusers {peer.variant.name}: warming up")
        await peer.alone(target, ask)
        target.restart()
        while len(rounds) < times and (not rounds or target.now() < budget_seconds):
            say(f"diffusers {peer.variant.name}: one request, {len(rounds) + 1} of {times}")
            alone = await peer.alone(target, ask)
            queued = completed(await target.make(ask)).latency_seconds
            rounds.append((alone, queued, await beside() if beside else 0.0))
    alones, queueds, besides = zip(*rounds, strict=True)
    return PeerTimes(peer.variant.name, alones, queueds, besides if beside else ())


def completed(outcome: Outcome) -> Outcome:
    """Raises `OSError` for one that failed."""
    if outcome.error is not None:
        raise OSError(f"a request that was measured failed: {outcome.error}")
    return outcome


def computes_bf16(flags: Sequence[str]) -> bool:
    """Whether a CPU with these vector instructions does; without them torch takes minutes for a video in bf16."""
    return any(flag.endswith("_bf16") for flag in flags)


def variants(flags: Sequence[str]) -> list[Variant]:
    """For a CPU with these vector instructions. The compiled one comes later, of whichever precision turns out the
    faster."""
    return [Variant("fp32"), *([Variant("bf16")] if computes_bf16(flags) else [])]


def faster(times: Sequence[PeerTimes]) -> Variant:
    """The compiled variant of the fastest of these."""
    return Variant(min(times, key=lambda one: one.best).variant, compiled=True)


def peers_table(times: Sequence[PeerTimes]) -> str:
    rows = [
        (one.variant, spread(Spread.of(one.alone), time=True), spread(Spread.of(one.queued), time=True))
        for one in times
    ]
    return table(["diffusers' WanPipeline", "alone, to pixels", "behind a FastAPI queue, to H.264"], rows)

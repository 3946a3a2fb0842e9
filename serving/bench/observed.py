"""What a Rushes service says of itself at its `/metrics`, before and after a run: where the time of its stages went."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serving.bench.tables import seconds, share, table
from serving.metrics import BATCH_ROWS, EMBEDDINGS, STAGE_BUSY, STAGE_CALL

# Each series' values, by the label that matters here: the stage, or whether the cache had it.
Counts = Mapping[tuple[str, str], float]
# Ray's replicas report every ten seconds or so.
_QUIET_SECONDS, _LONGEST_SECONDS, _LOOK_SECONDS = 12.0, 60.0, 0.5
(_BUSY,) = STAGE_BUSY.exported
_, _CALL_SECONDS, _CALLS = STAGE_CALL.exported
_, _ROWS, _ROW_CALLS = BATCH_ROWS.exported
(_EMBEDDINGS,) = EMBEDDINGS.exported
_WANTED = (_BUSY, _CALL_SECONDS, _CALLS, _ROWS, _ROW_CALLS, _EMBEDDINGS)


@dataclass(frozen=True, slots=True)
class Observed:
    """`occupancy` is the share of the time in which a stage's engines were busy, over all replicas; `by_request` is
    that time for each completed request, and what of the mean latency it leaves unexplained is `rest`. Calls that
    requests share count for each of them in part."""

    occupancy: dict[str, float]
    call_seconds: dict[str, float]
    calls: dict[str, float]
    rows: float | None
    cached_prompts: float | None
    by_request: dict[str, float]
    rest: float | None


def counts(page: str) -> Counts:
    """Of a page in Prometheus' text format."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name in _WANTED:
                key = sample.name, sample.labels.get("stage") or sample.labels.get("cache", "")
                found[key] = found.get(key, 0.0) + sample.value
    return found


def between(
    before: Counts, after: Counts, *, wall_seconds: float, completed: int, latency_seconds: float | None
) -> Observed:
    """`latency_seconds` is the mean of the requests that were completed, None when there are none."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}

    def by_label(name: str) -> dict[str, float]:
        return {label: value for (series, label), value in sorted(grown.items()) if series == name and value > 0}

    busy, calls, taken, prompts = map(by_label, (_BUSY, _CALLS, _CALL_SECONDS, _EMBEDDINGS))
    rows, row_calls = (sum(by_label(name).values()) for name in (_ROWS, _ROW_CALLS))
    by_request = {stage: value / completed for stage, value in busy.items()} if completed else {}
    return Observed(
        occupancy={stage: value / wall_seconds for stage, value in busy.items()} if wall_seconds else {},
        call_seconds={stage: taken.get(stage, 0.0) / count for stage, count in calls.items()},
        calls=calls,
        rows=rows / row_calls if row_calls else None,
        cached_prompts=prompts.get("hit", 0.0) / sum(prompts.values()) if prompts else None,
        by_request=by_request,
        rest=None if latency_seconds is None else latency_seconds - sum(by_request.values()),
    )


async def settled(url: str) -> Counts:
    """The counts once they no longer grow: they are reported with a delay. Raises `OSError` when there is no page."""
    async with httpx.AsyncClient(timeout=10) as http:
        known, quiet, waited = await _scraped(http, url), 0.0, 0.0
        while quiet < _QUIET_SECONDS and waited < _LONGEST_SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
            now = await _scraped(http, url)
            quiet = quiet + _LOOK_SECONDS if now == known else 0.0
            known, waited = now, waited + _LOOK_SECONDS
    return known


def observed_table(observed: Observed) -> str:
    rows = [
        (
            stage,
            share(busy),
            f"{observed.calls.get(stage, 0):.0f}",
            seconds(observed.call_seconds.get(stage, 0.0)),
            seconds(observed.by_request.get(stage, 0.0)),
        )
        for stage, busy in observed.occupancy.items()
    ]
    said = [table(["stage, by the service's own metrics", "busy", "calls", "a call takes", "a request takes"], rows)]
    if observed.rest is not None:
        said.append(f"Of the mean latency {seconds(observed.rest)} are in no engine call.")
    if observed.rows is not None:
        said.append(f"A denoiser's call had {observed.rows:.1f} rows on average.")
    if observed.cached_prompts is not None:
        said.append(f"{share(observed.cached_prompts)} of the prompts were in the cache.")
    return "\n\n".join([said[0], " ".join(said[1:])])


async def _scraped(http: httpx.AsyncClient, url: str) -> Counts:
    try:
        response = await http.get(url)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise OSError(f"there are no metrics at {url}: {error}") from None
    return counts(response.text)

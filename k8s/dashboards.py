"""Grafana's dashboards, out of a list of panels. A test checks every query against the metrics that there are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Gauges that every runner says alike are not to be added up.
_QUANTILES = (0.5, 0.95)
_COLUMNS, _HEIGHT = 2, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries` are pairs of PromQL and what its series are called; `unit` is Grafana's word."""

    title: str
    help: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"


@dataclass(frozen=True, slots=True)
class Dashboard:
    name: str
    title: str
    panels: Sequence[Panel]


def _quantiles(metric: str, by: str, quantiles: Sequence[float] = _QUANTILES) -> tuple[tuple[str, str], ...]:
    """Of a histogram, over the last five minutes."""
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return tuple(
        (f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket[5m])))", f"{legend} p{round(100 * q)}")
        for q in quantiles
    )


VIDEOS = Dashboard(
    "videos",
    "Rushes: videos",
    [
        Panel(
            "Time to first chunk",
            "From a video's creation to the moment that a viewer sees it begin.",
            _quantiles("ray_rushes_video_first_chunk_seconds", "model"),
            "s",
        ),
        Panel(
            "Between chunks",
            "Longer than a chunk plays, and viewers wait.",
            _quantiles("ray_rushes_video_chunk_interval_seconds", "model"),
            "s",
        ),
        Panel(
            "Seconds of making for a second of video",
            "Below 1, a video can be watched while it is made.",
            _quantiles("ray_rushes_video_realtime_factor", "model"),
        ),
        Panel(
            "Chunks that came too late",
            "The share that a player which began with the first chunk had to wait for.",
            (
                (
                    'sum by (model) (rate(ray_rushes_video_chunks_total{deadline="missed"}[5m])) / '
                    "sum by (model) (rate(ray_rushes_video_chunks_total[5m]))",
                    "{{model}}",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Attempts by their end",
            "Requeued ones are tried again; stale ones were another runner's by then.",
            (("sum by (outcome) (rate(ray_rushes_videos_ended_total[5m]))", "{{outcome}}"),),
            "ops",
        ),
        Panel(
            "Videos in the store",
            "Held ones wait for their key's others; lapsed ones have lost their runner.",
            (("max by (state) (ray_rushes_jobs)", "{{state}}"),),
        ),
        Panel(
            "Waiting time of the first in the queue",
            "What a new request should expect at least.",
            (("max(ray_rushes_jobs_oldest_queued_seconds)", "seconds"),),
            "s",
        ),
        Panel(
            "HTTP requests",
            "By status, as Ray Serve counts them.",
            (("sum by (status_code) (rate(ray_serve_num_http_requests_total[5m]))", "{{status_code}}"),),
            "ops",
        ),
    ],
)

STAGES = Dashboard(
    "stages",
    "Rushes: stages",
    [
        Panel(
            "Work in hand",
            "Seconds on the stage's own hardware, over all replicas: what autoscaling goes by.",
            (("sum by (model, stage) (ray_rushes_stage_outstanding_seconds)", "{{model}} {{stage}}"),),
            "s",
        ),
        Panel(
            "Replicas",
            "As Ray Serve's autoscaler wants them.",
            (("max by (deployment) (ray_serve_autoscaling_desired_replicas)", "{{deployment}}"),),
        ),
        Panel(
            "Waiting",
            "Calls and videos without a place in a replica.",
            (("sum by (model, stage) (ray_rushes_stage_waiting)", "{{model}} {{stage}}"),),
        ),
        Panel(
            "In work",
            "Calls and videos that have one.",
            (("sum by (model, stage) (ray_rushes_stage_in_flight)", "{{model}} {{stage}}"),),
        ),
        Panel(
            "Occupancy",
            "The share of its time that a replica's engine runs.",
            (("avg by (model, stage) (rate(ray_rushes_stage_busy_seconds_total[5m]))", "{{model}} {{stage}}"),),
            "percentunit",
        ),
        Panel(
            "Engine call",
            "A denoiser's is one step of all rows in the batch.",
            _quantiles("ray_rushes_stage_call_seconds", "model, stage"),
            "s",
        ),
        Panel(
            "Rows in a denoiser call",
            "A guided video has two; near `denoiser.max_rows` the batch is full.",
            (
                (
                    "sum by (model) (rate(ray_rushes_denoiser_batch_rows_sum[5m])) / "
                    "sum by (model) (rate(ray_rushes_denoiser_batch_rows_count[5m]))",
                    "{{model}}",
                ),
            ),
        ),
        Panel(
            "Prompts found in the cache",
            "The text encoder's.",
            (
                (
                    'sum by (model) (rate(ray_rushes_embeddings_total{cache="hit"}[5m])) / '
                    "sum by (model) (rate(ray_rushes_embeddings_total[5m]))",
                    "{{model}}",
                ),
            ),
            "percentunit",
        ),
    ],
)

STORES = Dashboard(
    "stores",
    "Rushes: stores",
    [
        Panel("Database", "One transaction.", _quantiles("ray_rushes_store_seconds", "operation"), "s"),
        Panel(
            "Database errors",
            "Transactions that failed.",
            (('sum by (operation) (rate(ray_rushes_store_seconds_count{outcome="error"}[5m]))', "{{operation}}"),),
            "ops",
        ),
        Panel("Artifacts", "One file, with every try.", _quantiles("ray_rushes_artifact_seconds", "operation"), "s"),
        Panel(
            "Artifact errors",
            "Files that were given up.",
            (('sum by (operation) (rate(ray_rushes_artifact_seconds_count{outcome="error"}[5m]))', "{{operation}}"),),
            "ops",
        ),
        Panel(
            "Webhooks",
            "Tries at telling a target.",
            (("sum by (outcome) (rate(ray_rushes_webhooks_total[5m]))", "{{outcome}}"),),
            "ops",
        ),
        Panel(
            "Videos in runners' hands",
            "Each runner's; `runner.max_videos` is the most.",
            (("sum by (replica) (ray_rushes_runner_videos)", "{{replica}}"),),
        ),
        Panel(
            "What runs",
            "Runners by version.",
            (("count by (version, ray, onnxruntime) (ray_rushes_build_info)", "{{version}} ray {{ray}}"),),
        ),
    ],
)

ALL = (VIDEOS, STAGES, STORES)


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana imports it; which Prometheus it asks is the reader's choice."""
    return {
        "uid": f"rushes-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["rushes"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(index, panel) for index, panel in enumerate(dashboard.panels)],
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    width = 24 // _COLUMNS
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": source,
        "gridPos": {"x": width * (index % _COLUMNS), "y": _HEIGHT * (index // _COLUMNS), "w": width, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": source, "expr": query, "legendFormat": legend}
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }


def write(directory: Path) -> None:
    """A file for each."""
    directory.mkdir(parents=True, exist_ok=True)
    for dashboard in ALL:
        text = json.dumps(grafana(dashboard), indent=1, ensure_ascii=False)
        (directory / f"{dashboard.name}.json").write_text(f"{text}\n", encoding="utf-8")

"""Alerts: each says what users feel or soon will, and names the part of `k8s/runbooks.md` that says what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

RUNBOOKS = "https://github.com/rushes/rushes/blob/main/k8s/runbooks.md"


@dataclass(frozen=True, slots=True)
class Alert:
    """`page`: somebody is woken up. `for_` is how long it must have been so."""

    name: str
    expr: str
    for_: str
    severity: Literal["page", "ticket"]
    summary: str


ALL = (
    Alert(
        "RushesDown",
        "absent(ray_rushes_build_info)",
        "5m",
        "page",
        "No runner of Rushes is measured: nothing is being made.",
    ),
    Alert(
        "RushesVideosFail",
        'sum by (model) (rate(ray_rushes_videos_ended_total{outcome="failed"}[10m])) / '
        'sum by (model) (rate(ray_rushes_videos_ended_total{outcome=~"failed|completed"}[10m])) > 0.05',
        "10m",
        "page",
        "{{ $value | humanizePercentage }} of the videos of {{ $labels.model }} fail.",
    ),
    Alert(
        "RushesAttemptsFail",
        'sum by (model) (increase(ray_rushes_videos_ended_total{outcome="requeued"}[15m])) > 10',
        "0m",
        "ticket",
        "{{ $value | humanize }} attempts at videos of {{ $labels.model }} had to be repeated within 15 minutes.",
    ),
    Alert(
        "RushesQueueStands",
        "max(ray_rushes_jobs_oldest_queued_seconds) > 900",
        "5m",
        "page",
        "The first video of the queue has waited {{ $value | humanizeDuration }}.",
    ),
    Alert(
        "RushesLeasesLapse",
        'max(ray_rushes_jobs{state="lapsed"}) > 0',
        "5m",
        "page",
        "{{ $value }} videos have lost their runner, and no other takes them.",
    ),
    Alert(
        "RushesFirstChunkSlow",
        "histogram_quantile(0.95, sum by (le, model) (rate(ray_rushes_video_first_chunk_seconds_bucket[10m]))) > 60",
        "15m",
        "ticket",
        "A viewer of {{ $labels.model }} waits {{ $value | humanizeDuration }} for the beginning (p95).",
    ),
    Alert(
        "RushesChunksLate",
        'sum by (model) (rate(ray_rushes_video_chunks_total{deadline="missed"}[10m])) / '
        "sum by (model) (rate(ray_rushes_video_chunks_total[10m])) > 0.5",
        "15m",
        "ticket",
        "{{ $value | humanizePercentage }} of the chunks of {{ $labels.model }} come later than they play.",
    ),
    Alert(
        "RushesStageSaturated",
        "sum by (model, stage) (ray_rushes_stage_outstanding_seconds) / "
        "count by (model, stage) (ray_rushes_stage_outstanding_seconds) > 300",
        "15m",
        "ticket",
        "Each replica of {{ $labels.model }} {{ $labels.stage }} has {{ $value | humanizeDuration }} of work in hand.",
    ),
    Alert(
        "RushesStageStuck",
        "sum by (model, stage) (ray_rushes_stage_in_flight) > 0 and "
        "sum by (model, stage) (rate(ray_rushes_stage_busy_seconds_total[10m])) == 0",
        "10m",
        "page",
        "{{ $labels.model }} {{ $labels.stage }} has work and doesn't do it.",
    ),
    Alert(
        "RushesDatabaseErrors",
        'sum(rate(ray_rushes_store_seconds_count{outcome="error"}[5m])) > 0.1',
        "5m",
        "page",
        "{{ $value | humanize }} transactions a second fail.",
    ),
    Alert(
        "RushesDatabaseSlow",
        "histogram_quantile(0.95, sum by (le) (rate(ray_rushes_store_seconds_bucket[10m]))) > 1",
        "15m",
        "ticket",
        "A transaction takes {{ $value | humanizeDuration }} (p95).",
    ),
    Alert(
        "RushesArtifactErrors",
        'sum(rate(ray_rushes_artifact_seconds_count{outcome="error"}[10m])) > 0',
        "10m",
        "page",
        "Files can't be written to the artifact store or read from it: finished videos are lost to their viewers.",
    ),
    Alert(
        "RushesWebhooksGivenUp",
        # A counter comes into being with its first count, in which `increase` sees none.
        'increase(ray_rushes_webhooks_total{outcome="given_up"}[1h]) > 0 or '
        '(ray_rushes_webhooks_total{outcome="given_up"} '
        'unless ray_rushes_webhooks_total{outcome="given_up"} offset 1h)',
        "0m",
        "ticket",
        "Targets of webhooks were tried for as long as the configuration says, and never heard.",
    ),
    Alert(
        "RushesVersionsMixed",
        "count(count by (version) (ray_rushes_build_info)) > 1",
        "1h",
        "ticket",
        "Runners of {{ $value }} versions have been running for an hour: an upgrade is stuck.",
    ),
)


def rules() -> dict[str, Any]:
    """What `promtool` reads, and what a PrometheusRule holds."""
    return {
        "groups": [
            {
                "name": "rushes",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expr,
                        "for": alert.for_,
                        "labels": {"severity": alert.severity, "service": "rushes"},
                        "annotations": {
                            "summary": alert.summary,
                            "runbook_url": f"{RUNBOOKS}#{alert.name.lower()}",
                        },
                    }
                    for alert in ALL
                ],
            }
        ]
    }


def write(path: Path) -> None:
    text = yaml.safe_dump(rules(), sort_keys=False, width=120, allow_unicode=True)
    path.write_text(text, encoding="utf-8")

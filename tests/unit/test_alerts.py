"""Dashboards and alerts ask for metrics that there are; each alert fires when it should, and not when it shouldn't."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from queries import all_metrics, metrics_of

from k8s import alerts, dashboards, render
from serving.metrics import exported_names

# Ray Serve's own that are looked at.
RAYS = {"ray_serve_num_http_requests_total", "ray_serve_autoscaling_desired_replicas"}
MODEL = 'model="wan"'

# By alert: series that must set it off, and the same alert's series that must not. A line is `name{labels}` and values.
Series = dict[str, str]
CASES: dict[str, tuple[Series, Series]] = {
    "RushesDown": ({"up": "1x60"}, {"ray_rushes_build_info": "1x60"}),
    "RushesVideosFail": (
        {
            f'ray_rushes_videos_ended_total{{{MODEL},outcome="failed"}}': "0+1x60",
            f'ray_rushes_videos_ended_total{{{MODEL},outcome="completed"}}': "0+9x60",
        },
        {
            f'ray_rushes_videos_ended_total{{{MODEL},outcome="failed"}}': "0x60",
            f'ray_rushes_videos_ended_total{{{MODEL},outcome="completed"}}': "0+9x60",
        },
    ),
    "RushesAttemptsFail": (
        {f'ray_rushes_videos_ended_total{{{MODEL},outcome="requeued"}}': "0+1x60"},
        {f'ray_rushes_videos_ended_total{{{MODEL},outcome="requeued"}}': "0x50 1x10"},
    ),
    "RushesQueueStands": (
        {"ray_rushes_jobs_oldest_queued_seconds": "0+60x60"},
        {"ray_rushes_jobs_oldest_queued_seconds": "600x60"},
    ),
    "RushesLeasesLapse": ({'ray_rushes_jobs{state="lapsed"}': "2x60"}, {'ray_rushes_jobs{state="lapsed"}': "0x60"}),
    "RushesFirstChunkSlow": (
        {
            f'ray_rushes_video_first_chunk_seconds_bucket{{{MODEL},le="60.0"}}': "0x60",
            f'ray_rushes_video_first_chunk_seconds_bucket{{{MODEL},le="180.0"}}': "0+5x60",
            f'ray_rushes_video_first_chunk_seconds_bucket{{{MODEL},le="+Inf"}}': "0+5x60",
        },
        {
            f'ray_rushes_video_first_chunk_seconds_bucket{{{MODEL},le="60.0"}}': "0+5x60",
            f'ray_rushes_video_first_chunk_seconds_bucket{{{MODEL},le="+Inf"}}': "0+5x60",
        },
    ),
    "RushesChunksLate": (
        {
            f'ray_rushes_video_chunks_total{{{MODEL},deadline="missed"}}': "0+6x60",
            f'ray_rushes_video_chunks_total{{{MODEL},deadline="met"}}': "0+4x60",
        },
        {
            f'ray_rushes_video_chunks_total{{{MODEL},deadline="missed"}}': "0+4x60",
            f'ray_rushes_video_chunks_total{{{MODEL},deadline="met"}}': "0+6x60",
        },
    ),
    "RushesStageSaturated": (
        {
            f'ray_rushes_stage_outstanding_seconds{{{MODEL},stage="denoiser",replica="a"}}': "500x60",
            f'ray_rushes_stage_outstanding_seconds{{{MODEL},stage="denoiser",replica="b"}}': "200x60",
        },
        {
            f'ray_rushes_stage_outstanding_seconds{{{MODEL},stage="denoiser",replica="a"}}': "500x60",
            f'ray_rushes_stage_outstanding_seconds{{{MODEL},stage="denoiser",replica="b"}}': "0x60",
        },
    ),
    "RushesStageStuck": (
        {
            f'ray_rushes_stage_in_flight{{{MODEL},stage="denoiser"}}': "3x60",
            f'ray_rushes_stage_busy_seconds_total{{{MODEL},stage="denoiser"}}': "100x60",
        },
        {
            f'ray_rushes_stage_in_flight{{{MODEL},stage="denoiser"}}': "3x60",
            f'ray_rushes_stage_busy_seconds_total{{{MODEL},stage="denoiser"}}': "0+50x60",
        },
    ),
    "RushesDatabaseErrors": (
        {'ray_rushes_store_seconds_count{operation="write",outcome="error"}': "0+60x60"},
        {'ray_rushes_store_seconds_count{operation="write",outcome="error"}': "1x60"},
    ),
    "RushesDatabaseSlow": (
        {
            'ray_rushes_store_seconds_bucket{operation="write",le="1.0"}': "0x60",
            'ray_rushes_store_seconds_bucket{operation="write",le="2.5"}': "0+9x60",
            'ray_rushes_store_seconds_bucket{operation="write",le="+Inf"}': "0+9x60",
        },
        {
            'ray_rushes_store_seconds_bucket{operation="write",le="1.0"}': "0+9x60",
            'ray_rushes_store_seconds_bucket{operation="write",le="+Inf"}': "0+9x60",
        },
    ),
    "RushesArtifactErrors": (
        {'ray_rushes_artifact_seconds_count{operation="put",outcome="error"}': "0+1x60"},
        {'ray_rushes_artifact_seconds_count{operation="put",outcome="ok"}': "0+1x60"},
    ),
    "RushesWebhooksGivenUp": (
        {'ray_rushes_webhooks_total{outcome="given_up"}': "_x100 1x20"},
        {'ray_rushes_webhooks_total{outcome="given_up"}': "3x120"},
    ),
    "RushesVersionsMixed": (
        {'ray_rushes_build_info{version="0.1.0"}': "1x120", 'ray_rushes_build_info{version="0.2.0"}': "1x120"},
        {
            'ray_rushes_build_info{version="0.1.0",replica="a"}': "1x120",
            'ray_rushes_build_info{version="0.1.0",replica="b"}': "1x120",
        },
    ),
}


# Those that look back for an hour.
LONG = {"RushesVersionsMixed", "RushesWebhooksGivenUp"}


def promtool(*arguments: str, **files: Any) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool: install the `prometheus` package")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_query_asks_for_metrics_that_there_are() -> None:
    assert metrics_of("sum by (le) (rate(ray_nothing_bucket[5m]))") == {"ray_nothing_bucket"}
    assert all_metrics() - exported_names() == RAYS


def test_what_is_checked_in_is_what_the_code_makes(tmp_path: Path) -> None:
    dashboards.write(tmp_path)
    alerts.write(tmp_path / "alerts.yaml")
    files = render.CHART / "files"
    assert (files / "alerts.yaml").read_text() == (tmp_path / "alerts.yaml").read_text(), "run `python -m k8s.render`"
    for dashboard in dashboards.ALL:
        name = f"{dashboard.name}.json"
        assert (files / "dashboards" / name).read_text() == (tmp_path / name).read_text(), "run `python -m k8s.render`"


def test_dashboards_can_be_imported() -> None:
    for file in (render.CHART / "files" / "dashboards").glob("*.json"):
        dashboard = json.loads(file.read_text())
        assert dashboard["uid"] == f"rushes-{file.stem}"
        assert all(panel["description"] and panel["targets"] for panel in dashboard["panels"])
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
        assert len(set(places)) == len(places)


def test_every_alert_has_its_runbook() -> None:
    text = (render.HERE / "runbooks.md").read_text()
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## Rushes")]
    assert headings == [alert.name for alert in alerts.ALL]


def test_the_rules_are_right() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(render.CHART / "files" / "alerts.yaml"))


def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    assert CASES.keys() == {alert.name for alert in alerts.ALL}
    tests = []
    for name, cases in CASES.items():
        for fires, series in zip((True, False), cases, strict=True):
            tests.append(
                {
                    "interval": "1m",
                    "name": f"{name} {'fires' if fires else 'is silent'}",
                    "input_series": [{"series": one, "values": values} for one, values in series.items()],
                    # Only whether: what it says is in the rule itself.
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
                            "eval_time": "110m" if name in LONG else "50m",
                            "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                        }
                    ],
                }
            )
    file = tmp_path / "test.yaml"
    rules = str(render.CHART / "files" / "alerts.yaml")
    file.write_text(yaml.safe_dump({"rule_files": [rules], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(file))

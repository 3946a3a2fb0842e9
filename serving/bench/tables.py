"""Reports as Markdown: what a terminal, a pull request and BENCHMARKS.md show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serving.bench.report import Report
from serving.bench.statistics import Spread, Summary

_NONE = "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells may hold anything: what would end one is escaped. Columns are as wide as they must be."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def seconds(value: float) -> str:
    """With a unit that makes three digits of it."""
    if abs(value) >= 100:
        return f"{value:.0f} s"
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.1f} ms" if abs(value) >= 1e-3 or value == 0 else f"{1e6 * value:.0f} µs"


def share(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f} %"


def spread(value: Spread, *, time: bool = False) -> str:
    """`median (least to most, of count)`."""
    shown = seconds if time else _number
    if value.count == 1:
        return shown(value.median)
    return f"{shown(value.median)} ({shown(value.least)} to {shown(value.most)}, of {value.count})"


def load_table(report: Report) -> str:
    """Everything that a report says; a part for each label after the whole."""
    parts = [_load_part(report)]
    parts += [f"**{label}**\n\n{_load_part(part)}" for label, part in report.labels.items()]
    return "\n\n".join(parts)


def _load_part(report: Report) -> str:
    counted = [
        ("requests", f"{report.requests}, of which {report.completed} were completed"),
        ("errors", ", ".join(f"{count} x {kind}" for kind, count in report.errors.items()) or "none"),
        ("wall time", seconds(report.wall_seconds)),
        ("completed in a second", f"{report.requests_per_second:.3f}"),
        ("seconds of video in a second", f"{report.video_seconds_per_second:.2f}"),
    ]
    if report.attained.latency is not None:
        counted.append(("latency goal attained", share(report.attained.latency)))
    if report.attained.first_chunk is not None:
        counted.append(("first chunk's goal attained", share(report.attained.first_chunk)))
    if report.attained.both is not None:
        counted.append(("both goals attained", share(report.attained.both)))
    if (viewers := report.viewers) is not None:
        counted += [
            ("viewers without an underrun", f"{share(viewers.without_underrun)} of {viewers.count}"),
            ("chunks there when they were due", share(viewers.chunk_deadlines_met)),
            ("underruns", str(viewers.underruns)),
            ("viewers stood still for", seconds(viewers.stall_seconds)),
        ]
    timed: list[tuple[str, Summary | None]] = [
        ("latency", report.latency),
        ("time to first chunk", report.first_chunk),
        ("between chunks", report.between_chunks),
        *report.phases.items(),
        ("sent late by", report.sent_late),
    ]
    rows = [[name, *_percentiles(summary)] for name, summary in timed if summary is not None]
    if (factor := report.real_time_factor) is not None:
        values = (factor.mean, factor.p50, factor.p95, factor.p99, factor.most)
        rows.append(["real-time factor", *(f"{value:.2f}" for value in values)])
    return table(["figure", "value"], counted) + "\n\n" + table(["times", "mean", "P50", "P95", "P99", "longest"], rows)


def _percentiles(summary: Summary) -> list[str]:
    return [seconds(value) for value in (summary.mean, summary.p50, summary.p95, summary.p99, summary.most)]


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"

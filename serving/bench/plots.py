"""A run as pictures: PNG files beside its JSON. Needs matplotlib, which is the extra `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.bench.following import Outcome

_SIZE_INCHES, _DOTS_PER_INCH = (8, 4.5), 120


class NoPlots(RuntimeError):  # noqa: N818 - said to a user as it is
    """matplotlib isn't installed."""


def check_plots() -> None:
    """Raises `NoPlots`: before minutes of work, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NoPlots("plots need matplotlib: pip install 'rushes[bench]', or leave out --plots") from None


def plot_load(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """`latency.png`, how the latencies are spread, and `timeline.png`, where each request's time went.

    Raises `NoPlots`.
    """
    check_plots()
    completed = [outcome for outcome in outcomes if outcome.error is None]
    written = []
    if completed:
        figure, axes = _axes("latency in seconds", "share of requests")
        for label in dict.fromkeys(outcome.ask.label for outcome in completed):
            mine = [outcome for outcome in completed if outcome.ask.label == label]
            _stairs(axes, [outcome.latency_seconds for outcome in mine], f"{label} latency".strip())
            first = [o.first_chunk_seconds for o in mine if o.first_chunk_seconds is not None]
            _stairs(axes, first, f"{label} time to first chunk".strip(), style="--")
        axes.set_xlim(left=0)
        axes.legend()
        written.append(_saved(figure, folder / "latency.png"))
    figure, axes = _axes("seconds since the start", "request")
    for row, outcome in enumerate(outcomes):
        failed = outcome.error is not None
        axes.plot(
            [outcome.scheduled, outcome.ended], [row, row], color="tab:red" if failed else "tab:gray", linewidth=1
        )
        axes.plot([chunk.at_seconds for chunk in outcome.chunks], [row] * len(outcome.chunks), "|", color="tab:blue")
    written.append(_saved(figure, folder / "timeline.png"))
    return written


def plot_bars(names: Sequence[str], values: Sequence[float], unit: str, path: Path) -> Path:
    """One bar a name. Raises `NoPlots`."""
    check_plots()
    figure, axes = _axes(unit, "")
    axes.barh(list(names)[::-1], list(values)[::-1], color="tab:blue")
    return _saved(figure, path)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: it would want a screen, and keep every figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _stairs(axes: Any, values: Sequence[float], label: str, style: str = "-") -> None:
    if values:
        axes.ecdf(values, label=label, linestyle=style)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path

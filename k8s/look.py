"""The dashboards in a terminal, for where there is no Grafana: `python -m k8s.look [URL of Prometheus]`.

Each panel's queries are asked as Grafana would ask them, once; firing alerts come last.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from k8s import dashboards

_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def legend(text: str, labels: Mapping[str, str]) -> str:
    """Grafana's `{{label}}`, filled in."""
    return _LABEL.sub(lambda found: labels.get(found[1], ""), text)


def lines(prometheus: httpx.Client) -> Iterator[str]:
    """What there is to see now. Raises `httpx.HTTPError` without a Prometheus, and for a query that it refuses."""
    for dashboard in dashboards.ALL:
        yield f"# {dashboard.title}"
        for panel in dashboard.panels:
            yield f"{panel.title} [{panel.unit}]"
            found = [
                (legend(text, series["metric"]), series["value"][1])
                for query, text in panel.queries
                for series in _asked(prometheus, query)
            ]
            yield from (f"    {name}: {float(value):.4g}" for name, value in found)
            if not found:
                yield "    no data"
    yield "# Alerts"
    for series in _asked(prometheus, "ALERTS"):
        labels = series["metric"]
        yield f"    {labels['alertname']}: {labels['alertstate']} ({labels['severity']})"


def _asked(prometheus: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = prometheus.get("/api/v1/query", params={"query": query}).raise_for_status().json()
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:9090", help="of Prometheus")
    with httpx.Client(base_url=parser.parse_args().url, trust_env=False) as prometheus:
        for line in lines(prometheus):
            print(line)


if __name__ == "__main__":
    main()

"""Which metrics a PromQL query asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser

from k8s import alerts, dashboards


def metrics_of(query: str) -> set[str]:
    """Raises `ValueError` for one that isn't PromQL."""
    return {name for name in _names(promql_parser.parse(query)) if name}


def all_metrics() -> set[str]:
    """Everything that a dashboard or an alert looks at."""
    panels = [panel for dashboard in dashboards.ALL for panel in dashboard.panels]
    queries = [query for panel in panels for query, _ in panel.queries] + [alert.expr for alert in alerts.ALL]
    return {name for query in queries for name in metrics_of(query)}


def _names(expr: Any) -> Iterator[str | None]:
    if isinstance(expr, promql_parser.VectorSelector):
        yield expr.name
    elif isinstance(expr, promql_parser.MatrixSelector):
        yield expr.vector_selector.name
    elif isinstance(expr, promql_parser.BinaryExpr):
        yield from _names(expr.lhs)
        yield from _names(expr.rhs)
    elif isinstance(expr, promql_parser.Call):
        for each in expr.args:
            yield from _names(each)
    elif isinstance(
        expr,
        promql_parser.AggregateExpr | promql_parser.ParenExpr | promql_parser.UnaryExpr | promql_parser.SubqueryExpr,
    ):
        yield from _names(expr.expr)
    elif not isinstance(expr, promql_parser.NumberLiteral | promql_parser.StringLiteral):
        raise TypeError(f"{type(expr)} in a query")

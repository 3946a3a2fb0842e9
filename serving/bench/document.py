"""BENCHMARKS.md: prose that stays, and parts between markers that a run writes anew."""

from __future__ import annotations

import re
from collections.abc import Mapping


class DocumentError(ValueError):
    """The document lacks a marker."""


def marker(name: str, *, end: bool = False) -> str:
    return f"<!-- bench:{'end' if end else 'begin'} {name} -->"


def filled(document: str, parts: Mapping[str, str]) -> str:
    """The document with each part's text between its markers. Raises `DocumentError` for a part without a pair."""
    for name, text in parts.items():
        between = re.compile(rf"({re.escape(marker(name))}\n).*?({re.escape(marker(name, end=True))})", re.DOTALL)
        found = list(between.finditer(document))
        if len(found) != 1:
            raise DocumentError(f"there must be one pair of markers for {name!r}, not {len(found)}: {marker(name)}")
        start, end = found[0].span()
        document = f"{document[:start]}{found[0][1]}\n{text.strip()}\n\n{found[0][2]}{document[end:]}"
    return document

"""Symbolic dimensions as torch names them: `batch`, `2*rows`, or a sum of such."""

from __future__ import annotations

import re
from collections.abc import Mapping

from export.onnx import ExportError

_TERM = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*|\d+)")


def size_of(dim: int | str, symbols: Mapping[str, int]) -> int:
    """A dimension's size. Raises `ExportError` for a symbol that has none, and for what is no such sum."""
    if isinstance(dim, int):
        return dim
    total = 0
    for term in dim.replace(" ", "").split("+"):
        match = _TERM.fullmatch(term)
        if match is None:
            raise ExportError(f"The dimension {dim} is no sum of symbols and multiples of them.")
        factor, symbol = int(match[1] or 1), match[2]
        if not symbol.isdigit() and symbol not in symbols:
            raise ExportError(f"There is no size for the symbol {symbol} of the dimension {dim}.")
        total += factor * (int(symbol) if symbol.isdigit() else symbols[symbol])
    return total

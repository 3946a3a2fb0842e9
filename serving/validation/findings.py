"""What is wrong with a file, by the place in it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """`where` is such as `spec.rayClusterConfig.workerGroupSpecs[1].minReplicas`. One that isn't `certain` may be
    meant: it is said, and the file passes."""

    where: str
    message: str
    certain: bool = True

    def under(self, place: str) -> Finding:
        """The same, seen from whatever holds it."""
        return Finding(f"{place}.{self.where}" if self.where else place, self.message, self.certain)


def strangers(values: Mapping[str, Any], known: Collection[str], where: str) -> list[Finding]:
    """Keys that nobody reads, each with the one that may have been meant."""
    found = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), 1)
            meant = f": is {near[0]!r} meant?" if near else ""
            found.append(Finding(joined(where, str(key)), f"there is no such key{meant}"))
    return found


def joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def errors(found: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.certain]

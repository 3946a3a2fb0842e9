"""Whose turn it is, where there isn't room for all at once. No clock, no waiting."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

_Who = TypeVar("_Who", bound=Hashable)

# However many are in a hurry, one turn in so many goes to whoever has waited longest.
_FAIR_EVERY = 8


def most_of_others(places: int) -> int:
    """How many of so many places those may have whom nobody watches: one who comes to watch finds the rest free."""
    return max(1, places * 2 // 3)


class Turns(Generic[_Who]):
    """Those who wait. What is `interactive`, which somebody may be watching, goes before the rest; equals go in the
    order in which they came."""

    def __init__(self) -> None:
        self._waiting: dict[_Who, bool] = {}
        self._overtaken = 0  # turns in a row that went past whoever had waited longest

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, who: _Who, *, interactive: bool) -> None:
        """Behind those who are here. Raises `ValueError` for one who is waiting already."""
        if who in self._waiting:
            raise ValueError(f"{who!r} is waiting already")
        self._waiting[who] = interactive

    def leave(self, who: _Who) -> None:
        """Without a turn; harmless for one who isn't waiting."""
        self._waiting.pop(who, None)

    def first(self, *, interactive_only: bool = False) -> _Who | None:
        """Whose turn it is, if anybody's; with `interactive_only`, of those alone."""
        longest = next(iter(self._waiting), None)
        hurried = next((who for who, interactive in self._waiting.items() if interactive), None)
        if interactive_only or (hurried is not None and self._overtaken < _FAIR_EVERY - 1):
            return hurried
        return longest

    def take(self, *, interactive_only: bool = False) -> _Who | None:
        """As `first`, whose turn is over with that."""
        who = self.first(interactive_only=interactive_only)
        if who is not None:
            self._overtaken = 0 if who == next(iter(self._waiting)) else self._overtaken + 1
            del self._waiting[who]
        return who

"""How fast a stage is on the hardware that it runs on, learnt from its own calls."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.metrics import STAGE_BUSY, STAGE_CALL, labels_here

# What came so many calls ago counts a third: a GPU that others share changes its pace.
_REMEMBERED_CALLS = 50.0


@dataclass(frozen=True, slots=True)
class StageState:
    """A stage in one replica: calls or videos that wait for a place, those in work, and the seconds that all of them
    together will take here; `busy_seconds` is what its engines have run in all. Of the videos that are being played,
    the one that is nearest to running dry could wait for `slack_seconds` and still be in time."""

    waiting: int
    in_flight: int
    outstanding_seconds: float
    busy_seconds: float = 0.0
    slack_seconds: float = math.inf


class Pace:
    """Seconds for a unit of work: tokens for a denoiser, latents for a decoder, calls for a text encoder.

    `labels` are those under which the stage was opened, for all that it measures.
    """

    def __init__(self) -> None:
        self.labels = labels_here()
        self._units = self._seconds = 0.0
        self.busy_seconds = 0.0

    def took(self, units: float, seconds: float) -> None:
        """An engine call of so many units. It is measured, too."""
        kept = 1 - 1 / _REMEMBERED_CALLS
        self._units, self._seconds = kept * self._units + units, kept * self._seconds + seconds
        self.busy_seconds += seconds
        STAGE_BUSY.add(seconds, **self.labels)
        STAGE_CALL.observe(seconds, **self.labels)

    def seconds(self, units: float) -> float:
        """What so much work will take; 0 before the first call, which nothing is known of."""
        return units * self._seconds / self._units if self._units else 0.0

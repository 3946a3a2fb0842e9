"""How many replicas each stage of a model should have: by work in seconds, and for all of its stages together. No Ray.

What waits in one stage is what comes to the next: the decoder is scaled for the videos that are being denoised, in the
proportion that both have had in engine time so far. A replica takes its cold start to be there, so it is only asked for
if there will be work for it then. Streams that are about to run dry ask for one more, whatever the sums say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# In the order that a video takes.
ORDER = ("text-encoder", "denoiser", "decoder")


@dataclass(frozen=True, slots=True)
class Load:
    """One stage of one model. `outstanding_seconds` is the work in its replicas' hands on their own hardware, over all
    of them; `queued` is how many calls have no replica yet, and `in_flight` how many have; `busy_seconds` is what its
    engines have run in all. Of the videos that are being played, the nearest to running dry has `slack_seconds` to
    spare. So many of the `replicas` are still `starting`."""

    replicas: int
    least: int
    most: int
    outstanding_seconds: float = 0.0
    queued: float = 0.0
    in_flight: float = 0.0
    busy_seconds: float = 0.0
    slack_seconds: float = math.inf
    starting: int = 0

    @property
    def work_seconds(self) -> float:
        """With what is queued, each call as long as one in hand is on average."""
        each = self.outstanding_seconds / self.in_flight if self.in_flight else 0.0
        return self.outstanding_seconds + self.queued * each

    @property
    def idle(self) -> bool:
        return not (self.queued or self.in_flight or self.outstanding_seconds)


@dataclass(frozen=True, slots=True)
class Settings:
    """A stage has as many replicas as can do its work in `target_seconds`. One is taken away when the others would be
    less than `slack` of that full: what is just enough must not come and go. One more than there are is needed when a
    video that is being played has less than `stream_seconds` to spare."""

    target_seconds: float = 30.0
    cold_start_seconds: float = 60.0
    slack: float = 0.7
    stream_seconds: float = 0.5


def decide(loads: Mapping[str, Load], settings: Settings, shares: Mapping[str, float]) -> dict[str, int]:
    """Replicas for each stage in `loads`, whose keys are of `ORDER`. `shares` are engine seconds by stage, as
    `shares_of` keeps them."""
    awake = not all(load.idle for load in loads.values())
    wanted = {}
    ahead = 0.0  # work in stages before this one, as seconds of the stage just before it
    before = ""
    for stage in (name for name in ORDER if name in loads):
        load = loads[stage]
        if before and shares.get(before):
            ahead *= shares.get(stage, 0.0) / shares[before]
        else:
            ahead = 0.0
        wanted[stage] = _replicas(load, load.work_seconds + ahead, settings, awake=awake)
        ahead += load.work_seconds
        before = stage
    return wanted


def shares_of(loads: Mapping[str, Load], known: Mapping[str, float]) -> dict[str, float]:
    """Engine seconds by stage; those `known` from before while a stage has none, such as after a restart."""
    if all(load.busy_seconds > 0 for load in loads.values()):
        return {stage: load.busy_seconds for stage, load in loads.items()}
    return dict(known)


def _replicas(load: Load, work: float, settings: Settings, *, awake: bool) -> int:
    now = load.replicas
    # All stages of a model start together: the next one is needed by the time that this one is through.
    least = max(load.least, 1 if awake else 0)
    # What is left when a new replica would be there.
    left = max(0.0, work - now * settings.cold_start_seconds)
    up = math.ceil(left / settings.target_seconds)
    # Only if there is somebody to move over: a video that is late alone on its replica would be late on another.
    late = load.slack_seconds < settings.stream_seconds and load.in_flight + load.queued > now
    if late and not load.starting:
        up = max(up, now + 1)
    if up > now:
        return min(max(up, least), load.most)
    needed = now if late else math.ceil(work / settings.target_seconds)
    while now > needed and work < settings.slack * settings.target_seconds * (now - 1):
        now -= 1
    if not awake:
        now = load.least
    return min(max(now, least), load.most)

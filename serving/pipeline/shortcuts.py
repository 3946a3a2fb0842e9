"""Engine work that a video may do without, step by step, decided before it begins.

What is left out depends on the sampler's noise levels alone, never on what was computed: so a video that is gone on
with elsewhere leaves out the same, and its bits stay those of its request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

Cache = Literal["off", "fast", "faster"]
CACHES: Final[tuple[Cache, ...]] = ("off", "fast", "faster")
GuidanceCache = Literal["off", "alternate"]
GUIDANCE_CACHES: Final[tuple[GuidanceCache, ...]] = ("off", "alternate")
# How far the noise level may go, as a share of the whole way, until the model is asked again; and in how many steps.
_REACH: Final[dict[Cache, tuple[float, int]]] = {"off": (0.0, 0), "fast": (0.06, 1), "faster": (0.12, 2)}
# The first steps settle what is where, and the last ones how it looks.
_FIRST, _LAST = 3, 2
_FIRST_GUIDED = 2


def guided_steps(steps: int, interval: tuple[float, float]) -> list[bool]:
    """Which steps are guided: those that begin within these shares of the way (arXiv 2404.07724).

    The others cost one row instead of two. The bounds are of steps, counted from the noise on: `(0, 1)` is all.
    """
    first, last = interval
    return [first <= step / steps < last or (last == 1 and step / steps >= first) for step in range(steps)]


def reused_steps(sigmas: Sequence[float], cache: Cache) -> list[bool]:
    """Which steps take the step before's velocity instead of asking the model (`sigmas` has one more than steps).

    Velocities change with the noise level: where levels lie close together the next one is nearly the last. (TeaCache,
    arXiv 2411.19108, sums the changes of the time embedding in the same way.)
    """
    steps, (reach, most) = len(sigmas) - 1, _REACH[cache]
    reused, asked = [False] * steps, 0
    for step in range(1, steps):
        gone = abs(sigmas[step] - sigmas[asked]) / abs(sigmas[0] - sigmas[-1])
        if _FIRST <= step < steps - _LAST and step - asked <= most and gone < reach:
            reused[step] = True
        else:
            asked = step
    return reused


def full_steps(
    guided: Sequence[bool], reused: Sequence[bool], second: Sequence[bool], guidance_cache: GuidanceCache
) -> list[bool]:
    """Which of the guided steps run the unconditional row too. The others take the difference between the two
    velocities from the last step that did: it changes more slowly than either of them (FasterCache, arXiv 2410.19355).

    With `alternate` that is the first two, in which the difference changes most, then every second one, and the first
    that asks the `second` expert. A reused step asks for nothing, so it isn't counted.
    """
    full = [False] * len(guided)
    asked = [step for step in range(len(guided)) if guided[step] and not reused[step]]
    for number, step in enumerate(asked):
        before = asked[number - 1]
        just_done = number >= _FIRST_GUIDED and full[before] and second[before] == second[step]
        full[step] = guidance_cache == "off" or not just_done
    return full

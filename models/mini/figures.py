"""The evaluation's figures: shares with intervals and bars, a long video's drift, and how they are written down."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from models.mini.asks import Ask, Group
from models.mini.judge import Thing, Verdict, look
from models.mini.scene import FPS, FRAMES
from models.mini.world import Attributes

# The least shares, from the project's plan for this model.
ALL_BAR, EACH_BAR, TWO_BAR = 0.95, 0.97, 0.85
PSNR_BAR = 32.0  # dB
LOOSE_BAR, LONG_BAR, DRIFT_BAR = 4.0, 5.0, 5.0  # points, points, per cent
_ONE = ("color", "shape", "size", "motion", "floor", "light", "camera")
_BOTH = ("shape", "color", "other_shape", "other_color", "relation")


@dataclass(frozen=True, slots=True)
class Answer:
    """A video as the judge saw it; of a long one its first and, as `last`, its last two seconds."""

    ask: Ask
    verdict: Verdict
    last: Verdict | None = None
    color_drift_percent: float | None = None
    size_drift_percent: float | None = None

    @property
    def right(self) -> dict[str, bool]:
        return self.verdict.right(self.ask.attributes)

    @property
    def wrong(self) -> list[str]:
        """Names of what is wrong, at the end of a long video too."""
        wrong = [name for name, right in self.right.items() if not right]
        if self.last:
            wrong += [f"last {name}" for name, right in self.last.right(self.ask.attributes).items() if not right]
        return wrong


@dataclass(frozen=True, slots=True)
class Figure:
    """How many videos of a group have something right, and the share that should."""

    group: str
    name: str
    right: int
    total: int
    bar: float | None = None

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.total)


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that is no share: its mean and its worst, in a unit."""

    group: str
    name: str
    mean: float
    worst: float
    unit: str
    count: int
    bar: float
    least: bool = False

    @property
    def met(self) -> bool:
        return self.mean >= self.bar if self.least else self.mean <= self.bar


def answer(ask: Ask, frames: NDArray[np.uint8]) -> Answer:
    """Judge the video `[frames, height, width, 3]` that a request was answered with."""
    kind = ask.attributes.kind
    if ask.group != "long":
        return Answer(ask, look(frames, kind)[0])
    start = (len(frames) - FRAMES) / FPS
    first, before = look(frames[:FRAMES], kind)
    last, after = look(frames[-FRAMES:], kind, start)
    if not before or not after:
        return Answer(ask, first, last)
    color, size = drift(before[0], after[0], first.camera == "orbit")
    return Answer(ask, first, last, color, size)


def drift(before: Thing, after: Thing, hue_only: bool) -> tuple[float, float]:
    """How much an object's mean colour and its radius changed, in per cent.

    An orbiting camera comes to see the object's shaded side: there only the hue (`hue_only`) can be compared.
    """
    first, last = np.array(before.rgb), np.array(after.rgb)
    if hue_only:
        last = last * np.linalg.norm(first) / max(float(np.linalg.norm(last)), 1e-6)
    color = float(np.linalg.norm(last - first) / max(float(np.linalg.norm(first)), 1e-6))
    size = abs(after.radius / before.radius - 1) if before.radius > 0 else 1.0
    return 100 * color, 100 * size


def accuracies(attributes: list[Attributes], clips: list[NDArray[np.uint8]]) -> dict[str, float]:
    """Of clips `[frames, height, width, 3]` of any kind, the share that has each attribute right, among those with it.

    Raises `ValueError` when there are not as many clips as attributes.
    """
    rights = [look(clip, a.kind)[0].right(a) for a, clip in zip(attributes, clips, strict=True)]
    names = dict.fromkeys(name for right in rights for name in right)
    shares = {name: float(np.mean([right[name] for right in rights if name in right])) for name in names}
    return shares | {"all": float(np.mean([all(right.values()) for right in rights]))}


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (E. B. Wilson, JASA 22, 1927)."""
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def figures(answers: list[Answer], all_bar: float = ALL_BAR) -> list[Figure]:
    """Every share that the answers give, group by group."""
    found: list[Figure] = []
    groups: list[Group] = ["one", "two", "beats", "loose", "loose, rewritten", "long"]
    for group in groups:
        members = [a for a in answers if a.ask.group == group]
        if not members:
            continue
        rights = [a.right for a in members]
        if group == "long":
            lasts = [a.last.right(a.ask.attributes) for a in members if a.last]
            found.append(_share("long", "all, first two seconds", [all(r.values()) for r in rights]))
            found.append(_share("long", "all, last two seconds", [all(r.values()) for r in lasts]))
            continue
        if group == "two":
            found.append(
                _share(group, "both objects and relation", [all(r[n] for n in _BOTH) for r in rights], TWO_BAR)
            )
        for name in rights[0]:
            bar = EACH_BAR if group == "one" and name in _ONE else None
            found.append(_share(group, name.replace("_", " "), [r[name] for r in rights], bar))
        found.append(_share(group, "all", [all(r.values()) for r in rights], all_bar if group == "one" else None))
    return found


def _share(group: str, name: str, right: list[bool], bar: float | None = None) -> Figure:
    return Figure(group, name, sum(right), len(right), bar)


def measures(answers: list[Answer], psnr: list[float]) -> list[Measure]:
    """What is not a share: reconstruction (dB), differences between groups (points), drift (per cent)."""
    found = []
    if psnr:
        mean = float(np.mean(psnr))
        found.append(Measure("vae", "reconstruction", mean, min(psnr), "dB", len(psnr), PSNR_BAR, least=True))
    rewritten = [a for a in answers if a.ask.group == "loose, rewritten"]
    if rewritten:
        same = {a.ask.attributes for a in rewritten}
        captions = [a for a in answers if a.ask.group == "one" and a.ask.attributes in same]
        if captions:
            lost = 100 * (_all_right(captions) - _all_right(rewritten))
            found.append(Measure("loose, rewritten", "less than captions", lost, lost, "points", len(same), LOOSE_BAR))
    long = [a for a in answers if a.last]
    if long:
        last = sum(all(a.last.right(a.ask.attributes).values()) for a in long if a.last) / len(long)
        lost = 100 * (_all_right(long) - last)
        found.append(Measure("long", "less at the end", lost, lost, "points", len(long), LONG_BAR))
    for name in ("color", "size"):
        drifts = [d for a in long if (d := getattr(a, f"{name}_drift_percent")) is not None]
        if drifts:
            mean = float(np.mean(drifts))
            found.append(Measure("long", f"{name} drift", mean, max(drifts), "%", len(drifts), DRIFT_BAR))
    return found


def _all_right(answers: list[Answer]) -> float:
    return sum(all(a.right.values()) for a in answers) / len(answers)


def table(shares: list[Figure], others: list[Measure], before: dict[str, Any] | None) -> Table:
    """All figures with their bars, beside those of an earlier report (`before`, as `report` wrote it)."""
    shown = Table(title="held-out prompts, over HTTP")
    for title in ("group", "figure", "right", "95 % interval", "of", "bar", "before"):
        shown.add_column(title, justify="left" if title in ("group", "figure") else "right")
    earlier = {(row["group"], row["name"]): row for row in (before or {}).get("figures", [])}
    earlier |= {(row["group"], row["name"]): row for row in (before or {}).get("measures", [])}
    for index, figure in enumerate(shares):
        low, high = figure.interval
        old = earlier.get((figure.group, figure.name))
        shown.add_row(
            figure.group,
            figure.name,
            f"{figure.share:.1%}",
            f"{low:.1%} to {high:.1%}",
            str(figure.total),
            "" if figure.bar is None else f"{figure.bar:.0%}",
            "" if old is None else f"{old['share']:.1%} ({100 * (figure.share - old['share']):+.1f})",
            style=None if figure.bar is None else "green" if figure.share >= figure.bar else "red",
            end_section=index + 1 == len(shares) or shares[index + 1].group != figure.group,
        )
    for measure in others:
        old = earlier.get((measure.group, measure.name))
        shown.add_row(
            measure.group,
            measure.name,
            f"{measure.mean:.1f} {measure.unit}",
            f"worst {measure.worst:.1f}",
            str(measure.count),
            f"{'≥' if measure.least else '≤'} {measure.bar:.0f}",
            "" if old is None else f"{old['mean']:.1f} ({measure.mean - old['mean']:+.1f})",
            style="green" if measure.met else "red",
        )
    return shown


def report(answers: list[Answer], shares: list[Figure], others: list[Measure]) -> dict[str, Any]:
    """The figures, and what was seen in each video, as JSON."""
    return {
        "figures": [asdict(f) | {"share": f.share, "interval_95": list(f.interval)} for f in shares],
        "measures": [asdict(m) | {"met": m.met} for m in others],
        "videos": [
            {
                "group": a.ask.group,
                **a.ask.body,
                "asked": a.ask.attributes.to_json(),
                "seen": asdict(a.verdict),
                "seen_last": asdict(a.last) if a.last else None,
                "color_drift_percent": a.color_drift_percent,
                "size_drift_percent": a.size_drift_percent,
                "wrong": a.wrong,
            }
            for a in answers
        ],
    }

"""A contact sheet: a row of frames for each video, its prompt, and what the judge finds wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.mini.figures import Answer

COLUMNS = 6
_LINE = 32  # pixels of text over a row


def strip(frames: NDArray[np.uint8], columns: int = COLUMNS) -> NDArray[np.uint8]:
    """`columns` frames from first to last, side by side: `[height, columns * width, 3]`."""
    chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    return np.concatenate([frames[index] for index in chosen], axis=1)


def contact_sheet(answers: list[Answer], strips: list[NDArray[np.uint8]], path: Path) -> None:
    """Write the PNG."""
    sheet = Image.new("RGB", (max(s.shape[1] for s in strips), sum(s.shape[0] + _LINE for s in strips)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for answer, frames in zip(answers, strips, strict=True):
        seen = ", ".join(f"{name}: {_seen(answer, name)}" for name in answer.wrong)
        draw.text((4, top + 2), f"{answer.ask.group} {answer.ask.seed}: {answer.ask.prompt}", fill="black")
        draw.text((4, top + 16), seen or "right", fill="firebrick" if answer.wrong else "green")
        sheet.paste(Image.fromarray(frames), (0, top + _LINE))
        top += frames.shape[0] + _LINE
    sheet.save(path)


def _seen(answer: Answer, name: str) -> object:
    verdict = answer.last if name.startswith("last ") and answer.last else answer.verdict
    name = name.removeprefix("last ")
    return f"beside a {verdict.other_color} {verdict.other_shape}" if name == "alone" else getattr(verdict, name)

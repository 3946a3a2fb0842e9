"""Where what is derived from a video's fragment log lies."""

from __future__ import annotations

from pathlib import Path

from serving.jobs.fragment_log import FragmentLog


def finished_path(root: Path, video_id: str) -> Path:
    """A completed video's MP4, beside its fragments. Raises `ValueError` for anything but a video id."""
    return FragmentLog.open(root, video_id).path / "video.mp4"

"""`rushes reload` finds the service by its data directory, and hears how it went."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.config import ConfigError
from serving.reloading import STATE, State, reload


@pytest.fixture
def answers() -> Iterator[list[tuple[bool, str]]]:
    """What this process, as the service, says to each SIGHUP in turn."""
    before = signal.getsignal(signal.SIGHUP)
    yield []
    signal.signal(signal.SIGHUP, before)


def test_a_reload_waits_for_the_service_and_prints_what_it_did(tmp_path: Path, answers: list[tuple[bool, str]]) -> None:
    answers += [(True, "rolled mini, loaded other"), (False, "The bundle b lacks 'denoiser.onnx'")]
    with State.kept(tmp_path) as state:
        signal.signal(signal.SIGHUP, lambda *_: state.tell(*answers.pop(0)))
        result = CliRunner().invoke(app, ["reload", "--data-dir", str(tmp_path)])
        assert (result.exit_code, result.stdout.splitlines()) == (0, ["rolled mini", "loaded other"])
        with pytest.raises(ConfigError, match=r"refused, and serves what it did: The bundle b lacks 'denoiser.onnx'"):
            reload(tmp_path)
    assert answers == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_service_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no service runs on .*: start one with `rushes serve`"):
        reload(tmp_path)
    # One that was killed leaves its file; no process has this id, which is beyond Linux's largest.
    (tmp_path / STATE).write_text(json.dumps({"pid": (1 << 22) + 1, "reloads": 0, "done": True, "said": ""}))
    with pytest.raises(ConfigError, match="is gone: start it with"):
        reload(tmp_path)

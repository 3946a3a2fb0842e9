"""A pod that is to end waits for its replicas, as long as it may."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.deployments.drain import drain, replicas_here


def process(proc: Path, pid: int, command: bytes) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_bytes(command)


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `ray` command that notes what it was asked, and ends with the status in `status`."""
    (tmp_path / "status").write_text("0")
    command = tmp_path / "ray"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit $(cat {tmp_path}/status)\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_replicas_are_found_among_the_processes(tmp_path: Path) -> None:
    process(tmp_path, 1, b"raylet\0--x")
    process(tmp_path, 2, b"ray::ServeReplica:rushes:mini-denoiser\0")
    process(tmp_path, 3, b"ray::ServeReplica:rushes:mini-decoder.decode\0")
    process(tmp_path, 4, b"python\0-c\0ray::ServeReplica:\0")
    (tmp_path / "5").mkdir()
    (tmp_path / "self").mkdir()
    assert replicas_here(tmp_path) == 2


def test_ray_is_told_and_the_last_replica_waited_for(ray: Path) -> None:
    left = [1, 0]
    assert drain(60, lambda: left.pop(0))
    assert not left
    assert "drain-node" in (ray / "asked").read_text()
    assert "--deadline-remaining-seconds=60" in (ray / "asked").read_text()


def test_it_does_not_wait_for_ever(ray: Path) -> None:
    assert not drain(0, lambda: 1)


def test_a_refusal_is_said(ray: Path) -> None:
    (ray / "status").write_text("1")
    assert not drain(60, lambda: pytest.fail("nothing to wait for"))

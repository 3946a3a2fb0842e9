"""The command line, without Ray."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path

import av
import pytest
from rich.console import Console
from typer.testing import CliRunner

from models.bundle import Bundle
from serving.cli import app
from serving.oneshot import generate_file
from serving.pipeline.request import make_spec

runner = CliRunner()
SHORT = ["--seconds", "1", "--seed", "7", "--steps", "2"]


def test_generate_writes_a_video_and_prints_its_path(tiny_bundle: Bundle, tmp_path: Path) -> None:
    outputs = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for output in outputs:
        done = runner.invoke(
            app, ["generate", "a red ball", "-o", str(output), "--bundle", str(tiny_bundle.root), *SHORT]
        )
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{output}\n"
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    with av.open(str(outputs[0])) as video:
        assert sum(1 for _ in video.decode(video=0)) == tiny_bundle.manifest.fps + 1
    assert sorted(tmp_path.iterdir()) == outputs


def test_generate_rolls_a_causal_bundle_out(tiny_causal_bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    arguments = ["a red ball", "-o", str(output), "--bundle", str(tiny_causal_bundle.root), "--seconds", "5"]
    arguments += ["--scene", "2.5:a blue cube"]
    done = runner.invoke(app, ["generate", *arguments])
    assert done.exit_code == 0, done.output
    with av.open(str(output)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 5 * tiny_causal_bundle.manifest.fps + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", "-o", "a.mp4"], "prompt"),
        (["a ball", "-o", "a.mp4", "--size", "100x100"], "size"),
        (["a ball", "-o", "a.mp4", "--seconds", "0"], "seconds"),
        (["a ball", "-o", "a.mp4", "--steps", "100000"], "num_inference_steps"),
        (["a ball", "-o", "a.mp4", "--seed", "-1"], "seed"),
        (["a ball", "-o", "a.mp4", "--sampler", "heun"], "sampler"),
        (["a ball", "-o", "a.mp4", "--scene", "soon:a cube"], "SECONDS:PROMPT"),
        (["a ball", "-o", "a.mp4", "--scene", "1:a cube"], "needs a causal model"),
        (["a ball", "-o", "nowhere/a.mp4"], "no directory"),
        (["a ball", "-o", "."], "is a directory"),
        (["a ball", "-o", "a.mp4", "--bundle", "nowhere"], "no bundle"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = [] if "--bundle" in arguments else ["--bundle", str(tiny_bundle.root)]
    done = runner.invoke(app, ["generate", *arguments, *bundle])
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


async def test_an_interrupted_generate_leaves_no_file(tiny_bundle: Bundle, tmp_path: Path) -> None:
    spec = make_spec(tiny_bundle.manifest, "a red ball", num_inference_steps=tiny_bundle.manifest.limits.max_steps)
    console = Console(file=io.StringIO())
    making = asyncio.create_task(generate_file(tiny_bundle, spec, tmp_path / "a.mp4", console))
    await asyncio.sleep(0)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert os.listdir(tmp_path) == []


def test_serve_refuses_a_bad_config_before_it_starts_anything(tmp_path: Path) -> None:
    path = tmp_path / "rushes.yaml"
    path.write_text("denoiser:\n  max_row: 4\n")
    done = runner.invoke(app, ["serve", "--config", str(path)])
    assert done.exit_code == 2
    assert "denoiser.max_row: there is no such key" in done.stderr
    done = runner.invoke(app, ["serve", "--port", "0"])
    assert done.exit_code == 2
    assert "port" in done.stderr


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout.startswith("rushes 0.")

"""The command line, without Ray."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from rich.console import Console
from typer.testing import CliRunner

from models.bundle import MANIFEST, Bundle, Manifest
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
        (["a ball", "-o", "a.mp4", "--guidance-cache", "on"], "guidance_cache must be off or alternate"),
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


def test_inspect_says_what_was_proven(tiny_bundle: Bundle) -> None:
    done = runner.invoke(app, ["inspect", str(tiny_bundle.root)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    manifest = tiny_bundle.manifest
    for name in (*manifest.graphs, *manifest.files, tiny_bundle.digest, "diffusers' pipeline", "24 caches"):
        assert name in done.stdout
    assert all(info.sha256 in done.stdout and f"{info.bytes:,}" in done.stdout for info in manifest.files.values())
    assert f"{manifest.graphs['denoiser'].parity['velocity']:.1e}" in done.stdout
    asked = runner.invoke(app, ["inspect", str(tiny_bundle.root), "--json"])
    assert Manifest.model_validate_json(asked.stdout) == manifest


def rehashed(root: Path, name: str) -> None:
    """Make the manifest agree with a changed file, so that only what is in the file is wrong."""
    manifest = json.loads((root / MANIFEST).read_text())
    data = (root / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (root / MANIFEST).write_text(json.dumps(manifest))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def put_in_an_unknown_operator(path: Path) -> None:
    data = path.read_bytes()
    assert b"MatMul" in data
    path.write_bytes(data.replace(b"MatMul", b"MadMul"))


@pytest.mark.parametrize(
    ("name", "spoil", "hashes_fit", "said"),
    [
        ("denoiser.weights", cut_off, False, "bytes instead of"),
        ("decoder_next.onnx", flip_a_byte, False, "sha256"),
        ("tokenizer.json", Path.unlink, False, "lacks 'tokenizer.json'"),
        ("tokenizer.json", cut_off, True, "tokenizer.json: could not be loaded"),
        ("denoiser.onnx", put_in_an_unknown_operator, True, "MadMul"),
        ("denoiser.onnx", cut_off, True, "denoiser.onnx: could not be loaded"),
        ("denoiser.weights", cut_off, True, "denoiser.onnx: could not be loaded"),
    ],
)
def test_a_bad_bundle_is_refused_in_one_line(
    tiny_bundle: Bundle, tmp_path: Path, name: str, spoil: Callable[[Path], None], hashes_fit: bool, said: str
) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.root, root)
    spoil(root / name)
    if hashes_fit:
        rehashed(root, name)
    done = runner.invoke(app, ["generate", "a ball", "-o", str(tmp_path / "a.mp4"), "--bundle", str(root), *SHORT])
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    # Progress bars may stand above it.
    assert [line for line in done.stderr.splitlines() if "rushes:" in line] == [done.stderr.splitlines()[-1]]
    assert "Traceback" not in done.output
    assert isinstance(done.exception, SystemExit)
    assert os.listdir(tmp_path) == ["bundle"]


def test_export_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    done = runner.invoke(app, ["export", str(tmp_path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "rushes: " in done.stderr
    assert "StableDiffusionPipeline" in done.stderr
    assert os.listdir(tmp_path) == ["model_index.json"]


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout.startswith("rushes 0.")

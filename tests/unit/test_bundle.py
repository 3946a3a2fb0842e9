"""A bundle is read strictly: whatever is wrong with it is said in one sentence, before any engine is built."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.bundle import MANIFEST, Bundle, BundleError
from models.window import ContextWindow

GRAPHS = ("text_encoder", "denoiser", "decoder_first", "decoder_next")
FILES = {f"{name}.onnx": name.encode() * 10 for name in GRAPHS} | {
    "tokenizer.json": b"{}",
    "denoiser.weights": b"\0" * 99,
}

Change = Callable[[dict[str, Any]], None]


def manifest() -> dict[str, Any]:
    tensor = {"name": "x", "dtype": "float32", "shape": ["batch", 4]}
    return {
        "format": 1,
        "name": "tiny",
        "family": "wan",
        "rollout": "bidirectional",
        "fps": 16,
        "chunk_latent_frames": 3,
        "text": {"tokenizer": "tokenizer.json", "max_tokens": 64, "dim": 16},
        "latent": {"channels": 8, "spatial": 16, "temporal": 4, "patch": 2},
        "sampler": {"shift": 3.0, "guidance_scale": 3.0},
        "limits": {
            "default_size": [128, 128],
            "min_side": 64,
            "max_side": 256,
            "size_multiple": 16,
            "default_seconds": 2,
            "max_seconds": 8,
        },
        "graphs": {name: {"file": f"{name}.onnx", "inputs": [tensor], "outputs": [tensor]} for name in GRAPHS},
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in FILES.items()
        },
        "versions": {"torch": "2"},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(change: Change = lambda manifest: None) -> Path:
        root = tmp_path / "bundle"
        root.mkdir()
        for name, data in FILES.items():
            (root / name).write_bytes(data)
        content = manifest()
        change(content)
        (root / MANIFEST).write_text(json.dumps(content))
        return root

    return write


def refusal(root: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(root).verify()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "again", "`rushes export`"))
    return message


def test_a_good_bundle_loads_and_verifies(write: Callable[..., Path]) -> None:
    root = write()
    bundle = Bundle.load(str(root))
    bundle.verify()
    assert bundle.path_of("denoiser") == root / "denoiser.onnx"
    assert bundle.tokenizer == root / "tokenizer.json"
    assert bundle.manifest.name == "tiny"


def test_the_digest_names_the_content(write: Callable[..., Path]) -> None:
    root = write()
    digest = Bundle.load(root).digest
    assert digest == hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()
    (root / MANIFEST).write_text(json.dumps(manifest() | {"fps": 8}))
    assert Bundle.load(root).digest != digest


@pytest.mark.parametrize("section", ["rewriter", "captioner"])
def test_a_section_needs_its_graphs(write: Callable[..., Path], section: str) -> None:
    words = {"words": ["", "</s>", "a"], "starts": 1, "max_words": 8}
    extra = {"rewriter": {"buckets": 16, "max_prompt_words": 8}, "captioner": {"max_frames": 9}}
    root = write(lambda content: content.update({section: words | extra[section]}))
    assert f"no graph '{section}_encoder'" in refusal(root)


def test_missing_directory(tmp_path: Path) -> None:
    assert "There is no bundle" in refusal(tmp_path / "nowhere")


def test_missing_manifest(tmp_path: Path) -> None:
    assert "is no bundle" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"format": 1'])
def test_invalid_json(write: Callable[..., Path], text: str) -> None:
    root = write()
    (root / MANIFEST).write_text(text)
    assert "JSON" in refusal(root)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_wrong_format_number_comes_before_anything_else(write: Callable[..., Path], number: object) -> None:
    root = write(lambda content: content.update(format=number, novelty=True))
    assert f"format {number!r}" in refusal(root)


def test_missing_format_number(write: Callable[..., Path]) -> None:
    assert "format None" in refusal(write(lambda content: content.pop("format")))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda content: content.update(colour="red"), "`colour`"),
        (lambda content: content["limits"].update(max_size=1), "`limits.max_size`"),
        (lambda content: content["graphs"].update(judge=content["graphs"]["denoiser"]), "`graphs.judge"),
        (lambda content: content.pop("fps"), "`fps`"),
        (lambda content: content.update(fps=0), "`fps`"),
        (lambda content: content.update(name="../x"), "`name`"),
        (lambda content: content["files"]["tokenizer.json"].update(sha256="ab"), "`files.tokenizer.json.sha256`"),
    ],
)
def test_a_manifest_with_other_keys_or_values(write: Callable[..., Path], change: Change, where: str) -> None:
    assert where in refusal(write(change))


def causal(content: dict[str, Any], **changes: Any) -> None:
    content["rollout"] = "causal"
    content["causal"] = {"sink_chunks": 1, "window_chunks": 3, "layers": 2, "dim": 24} | changes
    shape = ["batch", 2, 2, 12, "rows", "columns", 24]
    denoiser = content["graphs"]["denoiser"]
    denoiser["inputs"] = [*denoiser["inputs"], {"name": "cache", "dtype": "float32", "shape": shape}]


def test_a_causal_bundle_says_what_it_remembers(write: Callable[..., Path]) -> None:
    bundle = Bundle.load(write(causal))
    assert bundle.manifest.window == ContextWindow(3, 1, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(rollout="causal"), "needs `causal`"),
        (lambda content: (causal(content), content.update(rollout="bidirectional")), "needs `causal`"),
        (lambda content: causal(content, window_chunks=4), "cache"),
        (lambda content: causal(content, layers=3), "cache"),
        (lambda content: causal(content, sink_chunks=-1), "`causal.sink_chunks`"),
        (lambda content: (causal(content), content["graphs"]["denoiser"].update(inputs=[])), "cache []"),
        (lambda content: content.update(experts={"boundary_timestep": 900}), "no graph 'denoiser_2'"),
        (lambda content: content["graphs"].update(denoiser_2=content["graphs"]["denoiser"]), "needs `experts`"),
        (lambda content: content.update(experts={"boundary_timestep": 1000}), "`experts.boundary_timestep`"),
        (lambda content: content.update(family="hunyuan"), "`family`"),
    ],
)
def test_a_rollout_that_does_not_fit_its_graph(write: Callable[..., Path], change: Change, words: str) -> None:
    assert words in refusal(write(change))


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_is_needed(write: Callable[..., Path], graph: str) -> None:
    assert f"no graph '{graph}'" in refusal(write(lambda content: content["graphs"].pop(graph)))


@pytest.mark.parametrize("name", ["tokenizer.json", "denoiser.onnx"])
def test_a_file_that_is_used_must_be_listed(write: Callable[..., Path], name: str) -> None:
    assert f"'{name}'" in refusal(write(lambda content: content["files"].pop(name)))


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_file(write: Callable[..., Path], name: str) -> None:
    root = write()
    (root / name).unlink()
    assert f"lacks '{name}'" in refusal(root)


def test_a_directory_in_place_of_a_file(write: Callable[..., Path]) -> None:
    root = write()
    (root / "denoiser.weights").unlink()
    (root / "denoiser.weights").mkdir()
    assert "lacks 'denoiser.weights'" in refusal(root)


def test_truncated_file(write: Callable[..., Path]) -> None:
    root = write()
    (root / "denoiser.weights").write_bytes(b"\0" * 98)
    assert "98 bytes instead of 99" in refusal(root)


def test_flipped_byte(write: Callable[..., Path]) -> None:
    root = write()
    (root / "denoiser.weights").write_bytes(b"\0" * 98 + b"\1")
    assert "sha256" in refusal(root)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret"])
def test_a_path_outside_is_refused_even_if_its_content_is_right(write: Callable[..., Path], name: str) -> None:
    root = write(lambda content: content["files"].update({name: content["files"]["tokenizer.json"]}))
    (root.parent / "secret").write_bytes(FILES["tokenizer.json"])
    assert "lies outside" in refusal(root)


def test_a_link_to_the_outside_is_refused(write: Callable[..., Path]) -> None:
    root = write()
    (root.parent / "secret").write_bytes(FILES["tokenizer.json"])
    (root / "tokenizer.json").unlink()
    (root / "tokenizer.json").symlink_to(root.parent / "secret")
    assert "lies outside" in refusal(root)


def test_the_bundle_may_itself_be_reached_by_a_link(write: Callable[..., Path], tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(write())
    Bundle.load(link).verify()


def test_reading_a_bundle_needs_no_torch() -> None:
    code = "import sys, models.bundle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

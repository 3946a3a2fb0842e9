"""Whatever stands in a `bundle.json`, it is read or refused in one line, and nothing outside the bundle is touched."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import models.mini
from models.bundle import MANIFEST, Bundle, BundleError

GOOD: dict[str, Any] = json.loads((Path(models.mini.__file__).parent / "bundle" / MANIFEST).read_text())
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("../../etc/passwd"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inside for place in places(item, (*at, key)))]


PLACES = places(GOOD)


def read(root: Path, data: bytes) -> str | None:
    """The refusal, or None when the bundle is read; nothing else may happen."""
    (root / MANIFEST).write_bytes(data)
    try:
        Bundle.load(root).verify()
    except BundleError as error:
        message = str(error)
        assert "\n" not in message
        assert message.isprintable()
        assert len(message) < 700
        return message
    return None


@FEW
@given(place=st.sampled_from(PLACES[1:]), value=JSON, how=st.sampled_from(["replace", "remove", "add"]))
def test_a_manifest_with_something_else_in_it(tmp_path: Path, place: tuple[Any, ...], value: Any, how: str) -> None:
    manifest = copy.deepcopy(GOOD)
    inside = manifest
    for key in place[:-1]:
        inside = inside[key]
    if how == "replace":
        inside[place[-1]] = value
    elif how == "remove":
        del inside[place[-1]]
    elif isinstance(inside, dict):
        inside[str(value)] = value
    else:
        inside.insert(0, value)
    # The files are not there, so no manifest is good; what counts is that it is said in one line.
    assert read(tmp_path, json.dumps(manifest).encode()) is not None


@FEW
@given(start=st.integers(0, 20000), data=st.binary(max_size=8))
def test_a_manifest_with_other_bytes_in_it(tmp_path: Path, start: int, data: bytes) -> None:
    text = json.dumps(GOOD).encode()
    assert read(tmp_path, text[:start] + data + text[start + len(data) :]) is not None


@FEW
@given(data=st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, data) is not None


@pytest.mark.parametrize("length", [0, 1, 100, 1000, 10000])
def test_a_manifest_cut_off(tmp_path: Path, length: int) -> None:
    assert "JSON" in str(read(tmp_path, json.dumps(GOOD).encode()[:length]))


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"format": 1' + b', "a": {"b": 1' * 50_000, b"\xff\xfe\x00", b"1" * 100_000]
)
def test_absurd_json(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, data) is not None


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a\0b", "x" * 5000, "/etc/passwd", "..", ".", ""])
def test_absurd_file_names(tmp_path: Path, name: str) -> None:
    files = {**GOOD["files"], name: {"sha256": "0" * 64, "bytes": 0}}
    for listed in GOOD["files"]:
        (tmp_path / listed).write_bytes(b"")
    assert read(tmp_path, json.dumps(GOOD | {"files": files}).encode()) is not None


def test_a_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "denoiser.onnx").symlink_to("denoiser.onnx")
    assert read(tmp_path, json.dumps(GOOD).encode()) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent": GOOD["latent"] | {"channels": 7}}, "latents"),
        ({"text": GOOD["text"] | {"dim": 7}}, "`text.dim` 7"),
        ({"family": "sora"}, "`family`"),
        ({"limits": GOOD["limits"] | {"max_side": -1}}, "`limits.max_side`"),
    ],
)
def test_a_manifest_that_does_not_fit_its_graphs(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    assert words in str(read(tmp_path, json.dumps(GOOD | change).encode()))

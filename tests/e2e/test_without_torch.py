"""Serving must import where torch isn't installed. CI has an environment without it too; this is the quick check."""

from __future__ import annotations

import subprocess
import sys

_IMPORT_ALL = """
import importlib.abc, importlib, pkgutil, sys

REFUSED = {"torch", "transformers", "diffusers", "accelerate", "onnx", "onnxscript", "safetensors"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)
        return None

sys.meta_path.insert(0, Refuse())
import models.bundle, models.samplers, models.window, serving
names = [m.name for m in pkgutil.walk_packages(serving.__path__, "serving.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""

_EXPORT = """
import sys
sys.modules["export.checkpoint"] = None
from serving.cli import app
app(["export", "somewhere", "-o", "elsewhere"])
"""


def test_every_module_of_serving_imports_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_export_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", _EXPORT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'rushes[export]'" in done.stderr
    assert "Traceback" not in done.stderr

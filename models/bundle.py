"""The bundle: a directory that holds one servable model, described by `bundle.json`.

What the manifest says is in `models.manifest`; all of it can be imported from here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import get_args

from pydantic import ValidationError

from models.manifest import (
    FORMAT,
    OPTIONAL_GRAPHS,
    SERVED_GRAPHS,
    AdapterInfo,
    BetasInfo,
    CaptionerInfo,
    CausalInfo,
    ExpertsInfo,
    FamilyName,
    FileInfo,
    GraphInfo,
    GraphName,
    ImageInfo,
    LatentInfo,
    LimitsInfo,
    Manifest,
    NamedLoraInfo,
    Positions,
    Precision,
    PrecisionInfo,
    PreviewInfo,
    ProofInfo,
    RewriterInfo,
    SamplerInfo,
    TensorInfo,
    TextInfo,
    TinyDecoderInfo,
    TokenShift,
    WordsInfo,
)

__all__ = [
    "FORMAT",
    "LONGEST_LINE",
    "MANIFEST",
    "OPTIONAL_GRAPHS",
    "SERVED_GRAPHS",
    "AdapterInfo",
    "BetasInfo",
    "Bundle",
    "BundleError",
    "CaptionerInfo",
    "CausalInfo",
    "ExpertsInfo",
    "FamilyName",
    "FileInfo",
    "GraphInfo",
    "GraphName",
    "ImageInfo",
    "LatentInfo",
    "LimitsInfo",
    "Manifest",
    "NamedLoraInfo",
    "Positions",
    "Precision",
    "PrecisionInfo",
    "PreviewInfo",
    "ProofInfo",
    "RewriterInfo",
    "SamplerInfo",
    "TensorInfo",
    "TextInfo",
    "TinyDecoderInfo",
    "TokenShift",
    "WordsInfo",
    "sha256_of",
]

MANIFEST = "bundle.json"
LONGEST_LINE = 600


class BundleError(ValueError):
    """A bundle that can't be served. The message is one line: what is wrong, and what to do about it.

    It may quote names from a manifest that anybody wrote, so what would break the line or fill the screen is left out.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:300]} … {line[-200:]}")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk. `digest` is the manifest's sha256: it names the bundle's exact content in cache keys."""

    root: Path
    manifest: Manifest
    digest: str

    @classmethod
    def load(cls, path: Path | str, digest: str | None = None) -> Bundle:
        """Read `bundle.json` without touching the large files; `verify` does that. Raises `BundleError`.

        With a `digest`, also when it is another bundle than the one that had it.
        """
        root = Path(path)
        if not root.is_dir():
            raise BundleError(f"There is no bundle at {root}: check the path, or make one with `rushes export`.")
        try:
            data = (root / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleError(f"{root} is no bundle, since {MANIFEST} can't be read there: export it again.") from error
        manifest = _parse(root, data)
        for graph in get_args(GraphName):
            section = OPTIONAL_GRAPHS.get(graph)
            wanted = section is None or getattr(manifest, section) is not None
            if wanted and graph not in manifest.graphs:
                raise BundleError(f"The bundle {root} has no graph '{graph}': export it again.")
        for name in [manifest.text.tokenizer, *(graph.file for graph in manifest.graphs.values())]:
            if name not in manifest.files:
                raise BundleError(f"The bundle {root} uses '{name}' but does not list it in `files`: export it again.")
        bundle = cls(root, manifest, hashlib.sha256(data).hexdigest())
        if digest not in (None, bundle.digest):
            raise BundleError(f"The bundle {root} was replaced after the service had checked it: reload the service.")
        for name in manifest.files:
            bundle._inside(name)
        return bundle

    def verify(self) -> None:
        """Check every file's presence, size and sha256. Reads the whole bundle once. Raises `BundleError`."""
        for name, expected in self.manifest.files.items():
            path = self._inside(name)
            if not path.is_file():
                raise BundleError(f"The bundle {self.root} lacks '{name}': copy or export it again.")
            size = path.stat().st_size
            if size != expected.bytes:
                raise BundleError(
                    f"The bundle {self.root} has '{name}' with {size} bytes instead of {expected.bytes}: "
                    "the copy was cut off or replaced, so copy or export it again."
                )
            if sha256_of(path) != expected.sha256:
                raise BundleError(
                    f"The bundle {self.root} has '{name}' with another sha256 than the manifest says: "
                    "it was damaged or changed, so copy or export it again."
                )

    def path_of(self, graph: GraphName) -> Path:
        """The graph's ONNX file."""
        return self._inside(self.manifest.graphs[graph].file)

    @property
    def tokenizer(self) -> Path:
        """The `tokenizers` JSON file."""
        return self._inside(self.manifest.text.tokenizer)

    def _inside(self, name: str) -> Path:
        """The path of a file of the bundle; a manifest from elsewhere must not reach other files of this machine."""
        path = self.root / name
        named = PurePosixPath(name)
        try:
            outside = named.is_absolute() or ".." in named.parts
            outside = outside or not path.resolve().is_relative_to(self.root.resolve())
            path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long a name, links in a circle, a zero byte
            raise BundleError(f"The bundle {self.root} names '{name}', which is no path: export it again.") from error
        if outside:
            raise BundleError(f"The bundle {self.root} names '{name}', which lies outside: don't use this bundle.")
        return path


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(root: Path, data: bytes) -> Manifest:
    where = root / MANIFEST
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not valid JSON ({error}): copy or export the bundle again.") from error
    if not isinstance(raw, dict):
        raise BundleError(f"{where} must hold a JSON object: export the bundle again.")
    # Before anything else: a newer format has keys that this version would only call unknown.
    if raw.get("format") != FORMAT:
        raise BundleError(
            f"{where} has bundle format {raw.get('format')!r} and this version of rushes reads format {FORMAT}: "
            "export the bundle again with this version."
        )
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        at = f" at `{key}`" if key else ""
        said = first["msg"].removeprefix("Value error, ")
        raise BundleError(f"{where} is wrong{at} ({said}): export the bundle again.") from error

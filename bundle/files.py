"""A bundle as a folder: read with every check that needs no model runtime, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from pydantic import ValidationError

from bundle.manifest import NAME_PATTERN, Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
HOLDOUT: Final = "holdout.npz"

# What `model.onnx` may be: training writes within these bounds, serving takes no other.
OLDEST_OPSET: Final = 11  # TopK that sorts, which serving appends, begins here
NEWEST_OPSET: Final = 20  # and IR 10: what the CPU and the GPU wheel of ONNX Runtime both load
NEWEST_IR: Final = 10

_MAX_MANIFEST_BYTES: Final = 64 * 1024 * 1024
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class BundleError(Exception):
    """A folder that is no bundle. `code` is stable, the message is one sentence that says why."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class BundleExistsError(BundleError):
    """The folder to write is there already."""


@dataclass(frozen=True)
class Holdout:
    """Held-out training images as the network saw them: logits f, float32 (n, L); labels, int64 (n,)."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Bundle:
    """A folder whose manifest and checksums hold. `version`: the manifest's sha256, 16 digits."""

    folder: Path
    manifest: Manifest
    version: str

    def model_bytes(self) -> bytes:
        """The bytes of `model.onnx`, checked again as they are read: the file may have changed since."""
        data = (self.folder / MODEL).read_bytes()
        _check_sha256(MODEL, data, self.manifest.files[MODEL])
        return data

    def holdout(self) -> Holdout | None:
        """The held-out logits and labels, or None for a bundle without them. Raises BundleError."""
        if HOLDOUT not in self.manifest.files:
            return None
        data = (self.folder / HOLDOUT).read_bytes()
        _check_sha256(HOLDOUT, data, self.manifest.files[HOLDOUT])
        return _read_holdout(data, len(self.manifest.classes))


def version_of(manifest_bytes: bytes) -> str:
    """Return the version that a manifest's bytes give: 16 hex digits."""
    return hashlib.sha256(manifest_bytes).hexdigest()[:16]


def read(folder: Path) -> Bundle:
    """Read and check the bundle in `folder`. Raises BundleError with a code and the reason.

    Checked: no links, the manifest's own rules, that each file it names lies in the folder with the sha256
    it says, that there is a model, and that the held-out logits are finite and fit the classes. What needs
    `onnx` (weights, shapes, external data) is checked where the serving graph is composed.
    """
    if folder.is_symlink():
        raise BundleError("bundle-link", "the bundle's folder is a link; put the folder itself there")
    try:
        manifest_bytes = _read_plain(folder, MANIFEST, _MAX_MANIFEST_BYTES)
        manifest = parse_manifest(manifest_bytes)
        for name in (MODEL, *manifest.files):
            if name not in manifest.files:
                raise BundleError("bundle-incomplete", f"the manifest names no {name}")
            if not _FILE_NAME.fullmatch(name):
                raise BundleError(
                    "bundle-path", f"the manifest names {name!r}, which is not a file of the folder"
                )
            _check_sha256(name, _read_plain(folder, name), manifest.files[name])
        bundle = Bundle(folder, manifest, version_of(manifest_bytes))
        bundle.holdout()
    except OSError as failure:
        raise BundleError(
            "bundle-unreadable", f"the bundle cannot be read ({failure.strerror or 'input/output error'})"
        ) from failure
    return bundle


def parse_manifest(data: bytes) -> Manifest:
    """Parse and validate a manifest's bytes. Raises BundleError that names the first field at fault."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as failure:
        raise BundleError("manifest-syntax", "manifest.json is not JSON") from failure
    if isinstance(raw, dict) and json.dumps(raw.get("format", 1)) != "1":  # true and 1.0 equal 1 as well
        raise BundleError(
            "manifest-format", f"manifest.json has format {raw['format']!r}, this release reads 1"
        )
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError("manifest-invalid", f"manifest.json: {where}: {first['msg']}") from failure


def check_name(name: str) -> None:
    """Raise BundleError unless a model can have this name."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise BundleError(
            "bundle-name", f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-', at most 64"
        )


def check_place(folder: Path, *, force: bool) -> None:
    """Raise BundleError unless a bundle may be written to `folder`."""
    check_name(folder.name)
    if folder.exists() and not force:
        raise BundleExistsError("bundle-exists", f"{folder} exists already; --force replaces it")


def write(folder: Path, manifest: Manifest, files: Mapping[str, bytes], *, force: bool = False) -> Bundle:
    """Write a bundle that appears whole: into a sibling folder, synced, then renamed.

    `files` maps names to contents; the manifest's `files` is filled in from them. With `force` an existing
    folder is replaced. Raises BundleExistsError, or BundleError for a content that would not read back.
    """
    check_place(folder, force=force)
    for name in files:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise BundleError("bundle-path", f"{name!r} cannot name a file of a bundle")
    whole = manifest.model_copy(
        update={"files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
    )
    # Releases that know no precision refuse the field; what has none stays readable to them.
    absent = {"precision"} if whole.precision is None else None
    manifest_bytes = whole.model_dump_json(indent=1, exclude=absent).encode() + b"\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        for name, data in {**files, MANIFEST: manifest_bytes}.items():
            with (scratch / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        bundle = read(scratch)
        _swap_in(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Bundle(folder, bundle.manifest, bundle.version)


def encode_holdout(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> bytes:
    """Return the bytes of `holdout.npz`: logits f as float32 (n, L) and labels as int64 (n,)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, logits=logits.astype(np.float32), labels=labels.astype(np.int64))
    return buffer.getvalue()


def _swap_in(scratch: Path, folder: Path) -> None:
    """Rename `scratch` to `folder`; an old folder stands aside until the new one is in place."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.rename(aside / folder.name)
        try:
            scratch.rename(folder)
        except OSError:
            (aside / folder.name).rename(folder)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        scratch.rename(folder)
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_plain(folder: Path, name: str, limit: int | None = None) -> bytes:
    path = folder / name
    if path.is_symlink():
        raise BundleError("bundle-link", f"{name} is a link; put the file itself there")
    if not path.is_file():
        raise BundleError("bundle-incomplete", f"{name} is missing")
    if limit is not None and path.stat().st_size > limit:
        raise BundleError("bundle-too-large", f"{name} is larger than {limit} bytes")
    return path.read_bytes()


def _check_sha256(name: str, data: bytes, expected: str) -> None:
    if hashlib.sha256(data).hexdigest() != expected:
        raise BundleError(
            "bundle-checksum", f"{name} is not the file that the manifest names: its sha256 differs"
        )


def _read_holdout(data: bytes, n_classes: int) -> Holdout:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            logits, labels = arrays["logits"], arrays["labels"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as failure:
        raise BundleError(
            "holdout-invalid", "holdout.npz does not hold the arrays logits and labels"
        ) from failure
    if logits.ndim != 2 or logits.shape[1] != n_classes or labels.shape != logits.shape[:1]:
        raise BundleError(
            "holdout-invalid", f"holdout.npz does not hold one row of {n_classes} logits a label"
        )
    if logits.dtype.kind != "f" or labels.dtype.kind not in "iu":
        raise BundleError("holdout-invalid", "holdout.npz needs float logits and integer labels")
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32)
    if not np.isfinite(logits).all():
        raise BundleError("holdout-invalid", "holdout.npz has logits that are not finite in float32")
    if labels.size and not (labels.min() >= 0 and labels.max() < n_classes):
        raise BundleError("holdout-invalid", "holdout.npz has a label that is no class of the manifest")
    return Holdout(logits, labels.astype(np.int64))

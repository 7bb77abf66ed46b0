"""A bundle's folder: what was written is read back, and every way to be no bundle has its code."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bundle import files
from bundle.files import (
    BundleError,
    BundleExistsError,
    encode_holdout,
    parse_manifest,
    read,
    version_of,
    write,
)
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a good bundle's folder, to be spoilt."""
    return tiny.make(tmp_path / "models" / "tiny").folder


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Replace a file so that its sha256 holds."""
    (folder / name).write_bytes(data)
    change_manifest(
        folder, lambda manifest: manifest["files"].update({name: hashlib.sha256(data).hexdigest()})
    )


def code_of(folder: Path) -> str:
    with pytest.raises(BundleError) as refusal:
        read(folder)
    assert "\n" not in refusal.value.detail
    assert str(folder) not in refusal.value.detail
    return refusal.value.code


def test_what_was_written_is_read_back_and_its_version_is_its_manifests_sha256(folder: Path) -> None:
    bundle = read(folder)
    text = (folder / "manifest.json").read_bytes()
    assert bundle.version == hashlib.sha256(text).hexdigest()[:16] == version_of(text)
    assert bundle.manifest.labels == list(tiny.LABELS)
    assert bundle.model_bytes() == tiny.network().SerializeToString()
    held_out = bundle.holdout()
    assert held_out is not None
    assert (held_out.logits.dtype, held_out.labels.dtype) == (np.float32, np.int64)
    assert held_out.logits.shape == (16, 4)
    assert set(bundle.manifest.files) == {"model.onnx", "holdout.npz"}
    assert bundle.manifest == tiny.manifest(files=bundle.manifest.files)


def test_the_same_content_gives_the_same_version_and_one_changed_number_another(tmp_path: Path) -> None:
    first, second = tiny.make(tmp_path / "a" / "tiny"), tiny.make(tmp_path / "b" / "tiny")
    other = tiny.make(tmp_path / "c" / "tiny", temperature=1.26)
    assert first.version == second.version != other.version


@pytest.mark.parametrize("n_classes", [1, 2, 10_000])
def test_bundles_of_few_and_of_many_classes_are_read(tmp_path: Path, n_classes: int) -> None:
    bundle = tiny.make(tmp_path / "tiny", n_classes)
    assert len(read(bundle.folder).manifest.classes) == n_classes


def test_a_bundle_needs_no_held_out_logits(tmp_path: Path) -> None:
    bundle = write(tmp_path / "tiny", tiny.manifest(), {files.MODEL: b"weights"})
    assert bundle.holdout() is None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def link(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        target = (folder / name).rename(folder.parent / f"moved-{name}")
        (folder / name).symlink_to(target)

    return spoil


def manifest_text(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_bytes(data) and None


def names_file(name: str) -> Callable[[Path], None]:
    return lambda folder: change_manifest(folder, lambda m: m["files"].update({name: "0" * 64}))


def set_field(field: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: change_manifest(folder, lambda manifest: manifest.update({field: value}))


def holdout(**arrays: NDArray[Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        np.savez(folder / "new.npz", **arrays)
        data = (folder / "new.npz").read_bytes()
        (folder / "new.npz").unlink()
        replace_file(folder, "holdout.npz", data)

    return spoil


L4 = np.zeros((3, 4), np.float32)
INDEX = np.arange(3)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (remove("manifest.json"), "bundle-incomplete"),
        (remove("model.onnx"), "bundle-incomplete"),
        (remove("holdout.npz"), "bundle-incomplete"),
        (link("manifest.json"), "bundle-link"),
        (link("model.onnx"), "bundle-link"),
        (link("holdout.npz"), "bundle-link"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"other weights"), "bundle-checksum"),
        (lambda folder: (folder / "holdout.npz").write_bytes(b""), "bundle-checksum"),
        (lambda folder: change_manifest(folder, lambda m: m["files"].pop("model.onnx")), "bundle-incomplete"),
        *(
            (names_file(name), "bundle-path")
            for name in ("../secret", "/etc/passwd", "a/b", "..", ".", "", "a\0b")
        ),
        (names_file("missing.bin"), "bundle-incomplete"),
        (manifest_text(b""), "manifest-syntax"),
        (manifest_text(b"\xff\xfe"), "manifest-syntax"),
        (manifest_text(b"{'format': 1}"), "manifest-syntax"),
        (manifest_text(b"[" * 100_000), "manifest-syntax"),
        (manifest_text(b"[]"), "manifest-invalid"),
        (manifest_text(b"null"), "manifest-invalid"),
        (manifest_text(b"{}"), "manifest-invalid"),
        (set_field("format", 2), "manifest-format"),
        (set_field("format", "1"), "manifest-format"),
        (set_field("format", True), "manifest-format"),
        (set_field("temperature", 0), "manifest-invalid"),
        (set_field("unknown", 0), "manifest-invalid"),
        (holdout(logits=L4), "holdout-invalid"),
        (holdout(logits=L4[:, :3], labels=INDEX), "holdout-invalid"),
        (holdout(logits=L4, labels=INDEX[:2]), "holdout-invalid"),
        (holdout(logits=L4.astype(int), labels=INDEX), "holdout-invalid"),
        (holdout(logits=L4, labels=INDEX.astype(float)), "holdout-invalid"),
        (holdout(logits=L4 + np.nan, labels=INDEX), "holdout-invalid"),
        (holdout(logits=L4 - np.inf, labels=INDEX), "holdout-invalid"),
        (holdout(logits=L4.astype(float) + 1e300, labels=INDEX), "holdout-invalid"),
        (holdout(logits=L4, labels=INDEX + 2), "holdout-invalid"),
        (holdout(logits=L4, labels=INDEX - 1), "holdout-invalid"),
        (holdout(logits=L4, labels=np.full(3, 2**64 - 1, np.uint64)), "holdout-invalid"),
        (holdout(logits=np.array([[{}]]), labels=INDEX), "holdout-invalid"),
        (lambda folder: replace_file(folder, "holdout.npz", b"PK\3\4 not a zip"), "holdout-invalid"),
        (lambda folder: replace_file(folder, "holdout.npz", b""), "holdout-invalid"),
    ],
)
def test_a_spoilt_bundle_is_refused_by_its_code(
    folder: Path, spoil: Callable[[Path], Any], code: str
) -> None:
    spoil(folder)
    assert code_of(folder) == code


def test_a_folder_that_is_a_link_a_file_or_nowhere_is_no_bundle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert code_of(tmp_path / "link") == "bundle-link"
    assert code_of(folder / "manifest.json") in {"bundle-incomplete", "bundle-unreadable"}
    assert code_of(tmp_path / "nowhere") == "bundle-incomplete"


def test_a_manifest_too_large_to_be_one_is_not_read(folder: Path) -> None:
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(64 * 1024 * 1024 + 1)  # sparse: takes no disk
    assert code_of(folder) == "bundle-too-large"


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    assert code_of(folder) == "bundle-incomplete"


def test_a_failing_disk_is_said_to_make_the_bundle_unreadable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert code_of(folder) == "bundle-unreadable"


def test_files_beside_the_ones_it_names_do_not_matter(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    assert read(folder).manifest.labels == list(tiny.LABELS)


def test_a_model_that_changed_after_it_was_checked_is_not_handed_out(folder: Path) -> None:
    bundle = read(folder)
    (folder / "model.onnx").write_bytes(b"another")
    with pytest.raises(BundleError) as refusal:
        bundle.model_bytes()
    assert refusal.value.code == "bundle-checksum"


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_wherever_they_stand(folder: Path, token: str) -> None:
    text = (folder / "manifest.json").read_text().replace('"temperature": 1.25', f'"temperature": {token}')
    assert token in text
    with pytest.raises(BundleError) as refusal:
        parse_manifest(text.encode())
    assert refusal.value.code in {"manifest-syntax", "manifest-invalid"}


def test_writing_leaves_the_old_bundle_alone_unless_forced(tmp_path: Path) -> None:
    first = tiny.make(tmp_path / "tiny")
    with pytest.raises(BundleExistsError) as refusal:
        tiny.make(tmp_path / "tiny", temperature=2.0)
    assert refusal.value.code == "bundle-exists"
    assert read(tmp_path / "tiny").version == first.version
    (tmp_path / "tiny" / "stale.txt").write_text("of the old one")
    second = write(tmp_path / "tiny", tiny.manifest(temperature=2.0), {files.MODEL: b"new"}, force=True)
    assert read(tmp_path / "tiny").version == second.version != first.version
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["manifest.json", "model.onnx", "tiny"]


@pytest.mark.parametrize("name", ["-a", ".a", "a b", "ä", "a" * 65, "a\n"])
def test_a_folder_whose_name_cannot_name_a_model_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError) as refusal:
        write(tmp_path / name, tiny.manifest(), {files.MODEL: b""})
    assert refusal.value.code == "bundle-name"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("contents", "code"),
    [
        ({}, "bundle-incomplete"),
        ({files.MODEL: b"", "../escape": b""}, "bundle-path"),
        ({files.MODEL: b"", "sub/file": b""}, "bundle-path"),
        ({files.MODEL: b"", files.HOLDOUT: b"no npz"}, "holdout-invalid"),
        ({files.MODEL: b"", files.MANIFEST: b"{}"}, "bundle-path"),
    ],
)
def test_what_would_not_read_back_is_not_written(
    tmp_path: Path, contents: dict[str, bytes], code: str
) -> None:
    with pytest.raises(BundleError) as refusal:
        write(tmp_path / "models" / "tiny", tiny.manifest(), contents)
    assert refusal.value.code == code
    assert not [path for path in tmp_path.rglob("*") if path.name != "models"]


def test_a_failed_replacement_leaves_the_old_bundle_in_place(tmp_path: Path) -> None:
    first = tiny.make(tmp_path / "tiny")
    with pytest.raises(BundleError):
        write(tmp_path / "tiny", tiny.manifest(), {files.MODEL: b"", files.HOLDOUT: b"x"}, force=True)
    assert read(tmp_path / "tiny").version == first.version
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.slow
def test_a_kill_while_writing_leaves_no_half_bundle(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from bundle import files\n"
        "from tests import tiny\n"
        "calls = []\n"
        "def sync(handle, real=os.fsync):\n"
        "    calls.append(handle)\n"
        "    if len(calls) == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(handle)\n"
        "os.fsync = sync\n"
        "tiny.make(Path(sys.argv[1]) / 'tiny')\n"
    )
    for step in (1, 2, 3):  # each of the three files that are synced before the rename
        target = tmp_path / str(step)
        ran = subprocess.run(
            [sys.executable, "-c", script, str(target), str(step)],
            cwd=Path(__file__).parents[2],
            check=False,
        )
        assert ran.returncode == -9
        assert not (target / "tiny").exists()
        assert all(path.name.startswith(".tiny-") for path in target.iterdir())


def test_held_out_logits_come_back_as_they_were(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float16)
    data = encode_holdout(logits, np.array([0, 1, 2, 3, 3], np.uint8))
    bundle = write(tmp_path / "tiny", tiny.manifest(), {files.MODEL: b"", files.HOLDOUT: data})
    held_out = bundle.holdout()
    assert held_out is not None
    assert (held_out.logits == logits).all()
    assert held_out.labels.tolist() == [0, 1, 2, 3, 3]

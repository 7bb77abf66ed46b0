"""The compose files: valid, pinned, on loopback alone, and in step with the settings and files they name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.deploy import ROOT

BASE, GPU = ROOT / "docker-compose.yml", ROOT / "docker-compose.gpu.yml"


def against_the_specification(path: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def services(path: Any = BASE) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    return loaded


@pytest.mark.parametrize("path", [BASE, GPU], ids=lambda p: p.name)
def test_the_file_follows_the_compose_specification(path: Any) -> None:
    checked = against_the_specification(path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_key_that_compose_does_not_know_would_be_caught(tmp_path: Any) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(BASE.read_text().replace("read_only:", "readonly:"))
    assert against_the_specification(wrong).returncode != 0


def test_nothing_is_published_beyond_this_machine() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_the_service_has_no_more_rights_than_it_needs() -> None:
    tare = services()["tare"]
    assert tare["read_only"] is True
    assert tare["cap_drop"] == ["ALL"]
    assert tare["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in tare  # the image's own: 10001


def test_images_from_elsewhere_name_one_release() -> None:
    images = [service["image"] for service in services().values() if "build" not in service]
    assert images
    assert all(image.rpartition(":")[2].lstrip("v")[:1].isdigit() for image in images)


def test_it_hands_over_every_setting_that_the_service_reads_and_no_other() -> None:
    from service.settings import Settings  # noqa: PLC0415 - the other tests need no service

    known = {f"TARE_{name.upper()}" for name in Settings.model_fields}
    handed_over = {*services()["tare"]["environment"], *services(GPU)["tare"]["environment"]}
    # These four are the image's own: where it listens, and where its folders are.
    assert known - handed_over == {"TARE_HOST", "TARE_PORT", "TARE_MODELS_DIR", "TARE_STATE_DIR"}
    assert handed_over - known == set()


def test_every_file_it_mounts_lies_in_the_repository() -> None:
    mounts = [volume for service in services().values() for volume in service.get("volumes", [])]
    ours = [volume.split(":")[0] for volume in mounts if volume.startswith(".")]
    assert ours
    assert [path for path in ours if not (ROOT / path).is_dir()] == []


def test_the_gpu_file_changes_the_one_service_and_starts_no_other() -> None:
    overlay = services(GPU)
    assert list(overlay) == ["tare"]
    assert overlay["tare"]["build"]["target"] == "gpu"
    assert "profiles" not in overlay["tare"]
    [device] = overlay["tare"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}

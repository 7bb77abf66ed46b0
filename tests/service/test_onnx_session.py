"""Before a session opens: one wheel of ONNX Runtime, the cores there are, no trace on the machine."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

from service.adapters import onnx_session
from service.adapters.onnx_session import cores, installed_wheel
from service.core.ports import EngineError


def wheels(monkeypatch, *there):
    def version(wheel):
        if wheel not in there:
            raise importlib.metadata.PackageNotFoundError(wheel)
        return "1.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("wheel", ["onnxruntime", "onnxruntime-gpu"])
def test_one_wheel_is_named_with_its_version(monkeypatch, wheel):
    wheels(monkeypatch, wheel)
    assert installed_wheel() == f"{wheel} 1.32.0"


@pytest.mark.parametrize("there", [(), ("onnxruntime", "onnxruntime-gpu")])
def test_both_wheels_or_none_is_an_error_of_one_line(monkeypatch, there):
    wheels(monkeypatch, *there)
    with pytest.raises(EngineError, match="exactly one of onnxruntime and onnxruntime-gpu") as failure:
        installed_wheel()
    assert "\n" not in str(failure.value)


def test_the_import_leaves_no_file_in_an_empty_home(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY" and "XDG" not in k}
    subprocess.run(
        [sys.executable, "-B", "-c", "import service.adapters.onnx_session"],
        env={**environment, "HOME": str(home)},
        check=True,
    )
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("odd", 8)],
)
def test_cores_are_those_a_container_is_allowed(tmp_path, monkeypatch, text, expected):
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    monkeypatch.setattr(onnx_session, "_CPU_MAX", quota)
    monkeypatch.setattr(onnx_session.os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores() == expected

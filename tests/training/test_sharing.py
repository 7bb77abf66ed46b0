"""Sharing a GPU, with a stand-in for NVIDIA's program: when it is started and ended needs no driver."""

import os

import pytest

from training.sharing import gpu_shared

NAMES = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program of the service's name on the path that notes what it was told and exits with a code."""

    def make(code):
        path = tmp_path / "nvidia-cuda-mps-control"
        path.write_text(
            "#!/bin/sh\n"
            f'echo "$@ $(test -n "$1" || cat) in $CUDA_MPS_PIPE_DIRECTORY" >> {tmp_path}/told\n'
            f"exit {code}\n"
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return lambda: (tmp_path / "told").read_text().splitlines()

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return make


def test_the_service_runs_while_the_block_does_and_children_find_it(program):
    told = program(0)
    with gpu_shared() as shared:
        assert shared
        folder = os.environ[NAMES[0]]
        assert told() == [f"-d  in {folder}"]
    assert told()[1:] == [f" quit in {folder}"]
    assert not any(name in os.environ for name in NAMES)


def test_a_service_that_fails_to_start_leaves_the_runs_to_take_turns(program):
    told = program(1)
    with gpu_shared() as shared:
        assert not shared
        assert not any(name in os.environ for name in NAMES)
    assert len(told()) == 1


def test_a_service_that_is_set_already_is_left_alone(program, monkeypatch, tmp_path):
    program(0)
    monkeypatch.setenv(NAMES[0], "/theirs")
    with gpu_shared() as shared:
        assert shared
        assert os.environ[NAMES[0]] == "/theirs"
    assert os.environ[NAMES[0]] == "/theirs"
    assert not (tmp_path / "told").exists()


def test_without_the_program_nothing_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    with gpu_shared() as shared:
        assert not shared
        assert not any(name in os.environ for name in NAMES)

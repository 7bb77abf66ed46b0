"""Several runs on one GPU at the same time: without NVIDIA's Multi-Process Service they would take turns."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_WHERE = "CUDA_MPS_PIPE_DIRECTORY"
_LOGS = "CUDA_MPS_LOG_DIRECTORY"


@contextmanager
def gpu_shared() -> Iterator[bool]:
    """Let the processes started inside the block share the GPU; yield whether the service runs for them.

    Starts a service of our own, known to child processes by two environment variables, and ends it with the
    block. Where its program is missing or fails, or another service is set already, nothing is changed: runs
    side by side then work all the same, in turns that the driver decides. A process that has used the GPU
    before the block does not share it.
    """
    program = shutil.which("nvidia-cuda-mps-control")
    if program is None or _WHERE in os.environ:
        yield _WHERE in os.environ
        return
    with tempfile.TemporaryDirectory(prefix="tare-mps-") as folder:
        settings = {_WHERE: folder, _LOGS: folder}
        os.environ.update(settings)
        started = subprocess.run([program, "-d"], check=False, capture_output=True).returncode == 0
        try:
            if not started:
                _forget(settings)
            yield started
        finally:
            if started:
                subprocess.run([program], input=b"quit\n", check=False, capture_output=True)
                _forget(settings)


def _forget(settings: dict[str, str]) -> None:
    for name in settings:
        os.environ.pop(name, None)

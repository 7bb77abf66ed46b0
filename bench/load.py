"""Load, by wrk: so many connections, each posting the next image as soon as its last was answered."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SCRIPT: Final = Path(__file__).with_name("post.lua")
_PATIENCE_S: Final = 60


class LoadError(Exception):
    """There is no load to be had, and why."""


@dataclass(frozen=True)
class Load:
    """What came of one load of `seconds`.

    `requests` were answered, `refused` of them with other than 2xx; `broken` are connections that failed and
    answers that timed out. `per_s` are good answers a second, from the first sending to the last answer.
    """

    requests: int
    seconds: float
    refused: int
    broken: int
    p50_ms: float
    p99_ms: float
    per_s: float


def check_wrk() -> None:
    """Raise LoadError unless wrk is there."""
    if shutil.which("wrk") is None:
        raise LoadError("wrk is missing; install it (on Debian and Ubuntu: apt install wrk)")


def post(url: str, images: Path, connections: int, seconds: float) -> Load:
    """Post the images of a folder by turns over so many connections. Raises LoadError where wrk fails."""
    files = [str(path) for path in sorted(images.iterdir())]
    done = subprocess.run(
        [
            "wrk",
            "--threads=1",
            f"--connections={connections}",
            f"--duration={max(1, round(seconds))}s",
            f"--timeout={_PATIENCE_S}s",
            f"--script={_SCRIPT}",
            url,
            "--",
            *files,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LoadError(f"wrk failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return parsed(done.stdout, connections)


def parsed(output: str, connections: int) -> Load:
    """Read the line that the script writes at the end of what wrk prints.

    All that was sent has been answered but for the last request of each connection.
    """
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise LoadError("wrk ended without its figures")
    figures = json.loads(lines[-1])
    answered, took_s = figures.pop("sent") - connections, figures.pop("sending_s")
    good = 1 - figures["refused"] / max(1, figures["requests"])
    return Load(**figures, per_s=answered / took_s * good if answered > 0 else 0.0)

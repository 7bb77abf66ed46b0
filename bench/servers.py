"""How each server is started, watched and stopped, and the environment that a peer is installed into."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np

from service.adapters.onnx_session import installed_wheel

ROOT: Final = Path(__file__).parents[1]
OURS: Final = "ours"
PEERS: Final = {"litserve": "LitServe", "ray": "Ray Serve", "naive": "naive FastAPI"}
NAMES: Final = (OURS, *PEERS)

_START_S: Final = 120
_POLL_S: Final = 0.02
_ANSWER_S: Final = 120  # a request behind 512 others on a slow network waits long
_RESTING: Final = 0.2  # of a core; some never sleep soundly
_TICKS_S: Final = os.sysconf("SC_CLK_TCK")


class ServerError(Exception):
    """A server that does not start, does not answer, or answers something else than it should."""


@dataclass(frozen=True)
class Model:
    """What is served: the bundle for ours, the network from pixels to logits for the rest, images to post."""

    name: str
    bundle: Path
    network: Path
    images: Path
    kind: Literal["small", "large", "int8"]
    """Whose goals are its own: images of up to 64 pixels a side, larger ones, or a quantised network."""


class Server:
    """One running server and its processes. Stop it."""

    def __init__(self, name: str, model: Model, python: Path, folder: Path, **variables: str) -> None:
        """Start it on a free port; its log and whatever it keeps go under `folder`."""
        self.name = name
        self.port = _free_port()
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("TARE_")},
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder),
            "ORT_DISABLE_TELEMETRY": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if name == OURS:
            models = folder / "models"
            shutil.copytree(model.bundle, models / model.bundle.name)
            environment |= {
                "TARE_MODELS_DIR": str(models),
                "TARE_STATE_DIR": str(folder / "state"),
                "TARE_PORT": str(self.port),
            }
            words = ["-m", "service"]
        else:
            words = ["-m", f"bench.peers.{name}_app", str(model.network), str(self.port)]
        self._log = folder / "log"
        self.started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), *words],
                cwd=ROOT,
                env={**environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """Where predictions are made."""
        return f"http://127.0.0.1:{self.port}/predict"

    def until_good(self, image: bytes) -> float:
        """Return the seconds from the start to the first good answer. Raises ServerError."""
        while time.perf_counter() - self.started < _START_S:
            if self._process.poll() is not None:
                break
            try:
                self.top_one(image)
            except (OSError, http.client.HTTPException, ServerError):
                time.sleep(_POLL_S)
            else:
                return time.perf_counter() - self.started
        said = self._log.read_text(errors="replace").strip().splitlines()[-3:]
        raise ServerError(f"{self.name} gives no answer: {' '.join(said) or 'its log is empty'}")

    def top_one(self, image: bytes) -> int:
        """Return the class of the largest logit, by the answer to one request. Raises ServerError."""
        path = "/predict?include=logits" if self.name == OURS else "/predict"
        status, answer = self._ask(path, image)
        if status != 200:
            raise ServerError(f"{self.name} answers {status}: {answer}")
        if self.name == OURS:  # whose decision is adjusted; f is what the others rank
            return int(np.argmax(answer["predictions"][0]["logits"]))
        return int(answer["top"][0]["index"])

    def cpu_s(self) -> float:
        """Return the CPU time that its processes have spent, those that ended in between included."""
        return sum(_cpu_s(pid) for pid in self._pids())

    def memory_mib(self) -> float:
        """Return what its processes have in memory: proportional set size, each shared page counted once."""
        return sum(_pss_mib(pid) for pid in self._pids())

    def rest(self) -> None:
        """Wait until it has done with what the last load left behind, a minute at most."""
        for _ in range(300):
            before = self.cpu_s()
            time.sleep(0.2)
            if self.cpu_s() - before <= 0.2 * _RESTING:
                return

    def stop(self) -> None:
        """End all of its processes, at once: what it still works on belongs to nobody."""
        pids = self._pids()
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        self._process.wait()
        while any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
            time.sleep(_POLL_S)

    def _ask(self, path: str, body: bytes) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_S)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        try:
            return response.status, json.loads(data)
        except ValueError:
            return response.status, data[:200]

    def _pids(self) -> list[int]:
        """Return the process and all below it."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        found, waiting = [], [self._process.pid]
        while waiting:
            found.append(waiting.pop())
            waiting += children.get(found[-1], [])
        return found


def python_of(name: str, cache: Path, say: IO[str]) -> Path:
    """Return the interpreter of a server: ours, or a peer's, installed on first use. Raises ServerError."""
    if name == OURS:
        return Path(sys.executable)
    requirements = ROOT / "bench" / "peers" / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = cache / f"{name}-{digest}"
    stamp, python = folder / "installed", folder / "bin" / "python"
    if stamp.exists():
        return python
    print(f"installing {requirements.relative_to(ROOT)} into {folder}", file=say, flush=True)
    for words in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-r",
            str(requirements),
        ],
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise ServerError(f"{PEERS[name]} cannot be installed: {last}")
    stamp.touch()
    return python


def version(name: str, python: Path) -> str:
    """Return what serves, with its version."""
    if name == OURS:
        return installed_wheel()
    package = {"naive": "fastapi"}.get(name, name)
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return f"{package} {done.stdout.strip()}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name: state, parent, ...; none for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_S  # user, system, and those of reaped children


def _pss_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return

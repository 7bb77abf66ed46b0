"""A service as a process of its own, on a free port, that can be killed and started again on its state."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60


class Service:
    """One process of `python -m service`; its client is ready when `start` returns."""

    def __init__(self, folder, models):
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        self.models = models
        self.process = None
        self.client = None
        self.logs = []

    def environment(self, **variables):
        """What the process sees: nothing of ours but the path."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TARE_PORT": "0",
            "TARE_MODELS_DIR": str(self.models),
            "TARE_STATE_DIR": str(self.folder / "state"),
            **variables,
        }

    def refusal(self, **variables):
        """Start where it should not: return the exit code and the lines on stderr that are no log."""
        done = subprocess.run(
            [sys.executable, "-m", "service"],
            env=self.environment(**variables),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("{")]

    def start(self, module="service", within=(), **variables):
        """Start and wait until it listens and is ready. `within`: a command that replaces itself by ours."""
        log = (self.folder / f"log-{len(self.logs)}").open("w+")
        self.logs.append(log)
        self.process = subprocess.Popen(
            [*within, sys.executable, "-m", module],
            env=self.environment(**variables),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        url = self._until_listening()
        self.client = httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False)
        self.port = int(url.rpartition(":")[2])
        return self.client

    def kill(self):
        """kill -9: nothing gets to say goodbye."""
        self._end(signal.SIGKILL)

    def terminate(self):
        """SIGTERM; return the exit code."""
        return self._end(signal.SIGTERM)

    def log(self):
        """The log of the last process, as objects; a line that is none fails the test."""
        self.logs[-1].seek(0)
        return [json.loads(line) for line in self.logs[-1].read().splitlines()]

    def close(self):
        if self.process is not None:
            self.kill()
        for log in self.logs:
            log.close()

    def _end(self, number):
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self.process = None
        return code

    def _until_listening(self):
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self._read()
            for line in self._read().splitlines():
                if '"url":"http' in line:
                    return json.loads(line)["url"]
            time.sleep(0.02)
        pytest.fail(f"the service does not listen: {self._read()}")

    def _read(self):
        self.logs[-1].seek(0)
        return self.logs[-1].read()

"""The built image: not root, read-only, quiet, and its state outlives the container's process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import time
import uuid
from typing import TYPE_CHECKING

import httpx
import pytest
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

IMAGE = os.environ.get("IMAGE_UNDER_TEST")
NAMED = os.environ.get("CONTAINER_ENGINE")
ENGINE = shlex.split(NAMED) if NAMED else [p for p in map(shutil.which, ("docker", "podman")) if p][:1]
LOCKED_DOWN = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]


def engine(*arguments: str) -> str:
    done = subprocess.run([*ENGINE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Container:
    """The service in a container, with a state volume of its own."""

    def __init__(self) -> None:
        self.name = f"tare-test-{uuid.uuid4().hex[:8]}"
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        engine(
            *("run", "--detach", "--name", self.name, *LOCKED_DOWN),
            *("--volume", f"{self.name}:/state", "--publish", f"127.0.0.1:{port}:8000"),
            *("--env", "TARE_ALLOW_ANONYMOUS=1", str(IMAGE)),
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)

    def inside(self, *command: str) -> str:
        return engine("exec", self.name, *command)

    def python(self, program: str) -> str:
        return self.inside("python", "-c", program)

    def wait_until_ready(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/readyz").status_code == 200:
                    return
            time.sleep(0.2)
        said = subprocess.run([*ENGINE, "logs", self.name], capture_output=True, text=True, check=False)
        pytest.fail(f"not ready after {seconds} s: {said.stdout}{said.stderr}")

    def remove(self) -> None:
        self.client.close()
        engine("rm", "--force", "--volumes", self.name)
        engine("volume", "rm", "--force", self.name)


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    if not ENGINE:
        pytest.skip("neither docker nor podman is installed")
    if not IMAGE:
        pytest.skip("IMAGE_UNDER_TEST names no image of the Dockerfile's cpu target to try")
    running = Container()
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.remove()


def predict(container: Container) -> dict[str, object]:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 120, 40)).save(picture, "PNG")
    answer = container.client.post("/predict", content=picture.getvalue())
    assert answer.status_code == 200, answer.text
    prediction: dict[str, object] = answer.json()["predictions"][0]
    return prediction


def test_the_process_is_not_root_and_can_write_to_its_state_and_tmp_alone(container: Container) -> None:
    program = """
import os, json
def writable(folder):
    try:
        open(os.path.join(folder, "probe"), "w").close()
        os.remove(os.path.join(folder, "probe"))
        return True
    except OSError:
        return False
folders = "/", "/app", "/opt/venv", "/state", "/tmp"
print(json.dumps([os.getuid(), os.getgid(), [folder for folder in folders if writable(folder)]]))
"""
    assert json.loads(container.python(program)) == [10001, 10001, ["/state", "/tmp"]]


def test_the_image_holds_one_onnxruntime_and_no_torch(container: Container) -> None:
    program = """
from importlib.metadata import distributions
names = sorted(d.name for d in distributions())
print(*[n for n in names if n.startswith(("onnxruntime", "torch", "nvidia"))])
"""
    assert container.python(program) == "onnxruntime"


def test_the_health_check_of_the_image_passes_while_the_service_runs(container: Container) -> None:
    config = json.loads(engine("image", "inspect", str(IMAGE)))[0]
    health = (config.get("Config") or {}).get("Healthcheck") or config["Healthcheck"]
    assert health["Test"][0] == "CMD"
    container.inside(*health["Test"][1:])


def test_serving_leaves_no_file_in_the_home_folder(container: Container) -> None:
    predict(container)
    assert container.inside("ls", "-A", "/tmp") == ""


def test_what_was_acknowledged_is_there_again_after_the_process_was_killed(container: Container) -> None:
    prediction = predict(container)
    feedback = {"prediction_id": prediction["prediction_id"], "label": prediction["label"]}
    assert container.client.post("/feedback", json=feedback).json()["accepted"] == 1
    engine("kill", "--signal", "KILL", container.name)
    engine("start", container.name)
    container.wait_until_ready()
    stored = container.client.get(f"/predictions/{prediction['prediction_id']}").json()
    assert [label["label"] for label in stored["labels"]] == [prediction["label"]]
    assert container.client.get("/monitor").json()["labels"] == 1

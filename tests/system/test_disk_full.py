"""A full disk: 503, not ready, no answer that is not kept; and well again with room."""

import os
import resource
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.tiny import png

pytestmark = pytest.mark.slow

TARGET = {"red": 0.1, "green": 0.2, "blue": 0.3, "grey": 0.4}
# A file system of its own, that nobody else sees and that ends with the process.
SMALL = [
    *(["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]),
    *["sh", "-c", 'mount -t tmpfs -o size=6m tare "$TARE_STATE_DIR" && exec "$@"', "sh"],
]


class SmallDisk:
    """The state lies on a file system of 6 MiB, and a file of ours takes what is left of it: ENOSPC."""

    def __init__(self, service):
        state = service.folder / "state"
        state.mkdir()
        try:
            tried = subprocess.run(
                [*SMALL, "true"],
                env={**os.environ, "TARE_STATE_DIR": str(state)},
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:
            pytest.skip("no unshare here")
        if tried.returncode:
            pytest.skip("no file system may be mounted here")
        self.client = service.start(within=SMALL)
        # The process's own view of the folder.
        self._filler = Path(f"/proc/{service.process.pid}/root{state}/filler")

    @contextmanager
    def full(self):
        with self._filler.open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(b"x" * 4096)
        yield
        self._filler.unlink()


class LimitedFiles:
    """The state's log may not grow any more: EFBIG. Needs no right at all."""

    def __init__(self, service):
        self.client = service.start()
        self._process = service.process.pid
        self._file = service.folder / "state" / "tare.db-wal"

    @contextmanager
    def full(self):
        unlimited = resource.prlimit(self._process, resource.RLIMIT_FSIZE)
        limit = self._file.stat().st_size
        resource.prlimit(self._process, resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        yield
        resource.prlimit(self._process, resource.RLIMIT_FSIZE, unlimited)


@pytest.fixture(params=[SmallDisk, LimitedFiles], ids=["a full file system", "files that may not grow"])
def disk(service, request):
    return request.param(service)


def refused(answer):
    body = answer.json()
    assert (answer.status_code, body["code"]) == (503, "store-unavailable"), answer.text
    assert body["detail"].startswith("The state cannot be written: ")
    assert "tare.db" not in answer.text
    return body["detail"]


def test_a_full_disk_is_a_503_for_whatever_writes_and_not_ready_until_there_is_room_again(
    service, disk, pixels
):
    client, image = disk.client, png(pixels)
    before = client.post("/predict", content=image).json()
    identity = before["predictions"][0]["prediction_id"]
    feedback = {"prediction_id": identity, "label": "blue"}
    with disk.full():
        for _ in range(3):
            refused(client.post("/predict", content=image))
            refused(client.post("/feedback", json=feedback))
            refused(client.put("/priors", json={"probabilities": TARGET}))
            refused(client.get("/readyz"))
        refused(client.post("/predict", files=[("a", image), ("b", image)]))
        assert client.get("/healthz").status_code == 200
        assert "tare_ready 0.0" in client.get("/metrics").text
        # What needs no writing goes on.
        assert client.get(f"/predictions/{identity}").json()["predictions"] == before["predictions"]
        assert client.get("/priors/default").json()["version"] == 1
    assert client.get("/readyz").status_code == 200
    assert client.post("/predict", content=image).status_code == 200
    assert client.post("/feedback", json=feedback).json()["accepted"] == 1
    assert client.put("/priors", json={"probabilities": TARGET}).json()["version"] == 2
    report = client.get("/monitor").json()
    assert (report["predictions"], report["labels"]) == (2, 1)
    assert all("traceback" not in line for line in service.log())


def test_a_disk_that_fills_up_under_load_leaves_no_answer_unrecorded(disk, pixels):
    image, url = png(pixels), str(disk.client.base_url)
    answered, refusals, done = [], [], threading.Event()

    def ask():
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as own:
            while not done.is_set():
                answer = own.post("/predict", content=image)
                if answer.status_code == 200:
                    answered.append(answer.json()["predictions"][0]["prediction_id"])
                else:
                    refusals.append(refused(answer))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()

    def until(many, asked):
        wanted = len(many) + asked
        while len(many) < wanted:
            assert all(thread.is_alive() for thread in threads)

    for _ in range(3):
        until(answered, 50)
        with disk.full():
            until(refusals, 50)
    until(answered, 50)
    done.set()
    for thread in threads:
        thread.join()
    for identity in answered:
        assert disk.client.get(f"/predictions/{identity}").status_code == 200
    assert disk.client.get("/monitor").json()["predictions"] == len(answered)

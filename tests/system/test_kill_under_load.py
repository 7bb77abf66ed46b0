"""kill -9 again and again while clients predict, label and change priors: an account of all they were told.

Clients repeat what was cut off, as real ones do: feedback as it was, a PUT with the same `If-Match`. So the
account is exact in the end: one label where one was given, one version for every change.
"""

import os
import random
import threading
import time

import httpx
import pytest

from tests.tiny import LABELS, png

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("TEST_KILLS") or 10)
LABELLERS = 3


class Client(threading.Thread):
    """Asks one thing after the other, whatever happens to the service, until told to stop."""

    def __init__(self, where):
        super().__init__(daemon=True)
        self._where = where
        self._stopped = threading.Event()
        self.cut_off = 0  # requests without an answer
        self.failure = None

    def run(self):
        try:
            with httpx.Client(timeout=60, trust_env=False) as self._http:
                while not self._stopped.is_set():
                    self.turn()
        except Exception as failure:  # noqa: BLE001 - it is the test's to raise
            self.failure = failure

    def ask(self, method, path, **request):
        """Return the answer, None where the service died before it was whole."""
        try:
            return self._http.request(method, self._where["url"] + path, **request)
        except httpx.HTTPError:
            self.cut_off += 1
            time.sleep(0.02)
            return None

    def insist(self, method, path, **request):
        """Ask until there is an answer; return it, and whether it took more than one attempt."""
        again = False
        while (answer := self.ask(method, path, **request)) is None:
            again = True
        return answer, again

    def stop(self):
        self._stopped.set()
        self.join(120)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure


class Labeller(Client):
    """Predicts, labels what it was answered, and corrects every second label."""

    def __init__(self, where, image, seed):
        super().__init__(where)
        self._image = image
        self._random = random.Random(seed)
        self.answered = {}  # prediction_id: the whole answer
        self.labelled = {}  # prediction_id: the labels in the order of their receipts

    def turn(self):
        tau = round(self._random.uniform(0, 3), 2)
        answer = self.ask("POST", f"/predict?tau={tau}", content=self._image)
        if answer is None:
            return
        assert answer.status_code == 200, answer.text
        identity = answer.json()["predictions"][0]["prediction_id"]
        self.answered[identity] = answer.json()
        for label, receipt in zip(self._random.sample(LABELS, 2), ("accepted", "corrected"), strict=True):
            answer, again = self.insist("POST", "/feedback", json={"prediction_id": identity, "label": label})
            counts = {name: answer.json()[name] for name in ("accepted", "corrected", "unchanged")}
            # One that was cut off may have arrived: then it is there already, once.
            assert counts in [
                {**dict.fromkeys(counts, 0), name: 1} for name in (receipt, "unchanged")[: 1 + again]
            ]
            self.labelled.setdefault(identity, []).append(label)
            if self._random.random() < 0.5:
                break


class Setter(Client):
    """Sets priors, each version on top of the one it knows."""

    def __init__(self, where, seed):
        super().__init__(where)
        self._random = random.Random(seed)
        self.versions = {1: [0.25] * 4}
        self._etag = None

    def turn(self):
        weights = [self._random.uniform(0.1, 1) for _ in LABELS]
        target = [weight / sum(weights) for weight in weights]
        if self._etag is None:
            self._etag = self._current().headers["ETag"]
        answer, again = self.insist(
            "PUT", "/priors", json={"probabilities": target}, headers={"If-Match": self._etag}
        )
        if again and answer.status_code == 412:  # the one that was cut off had arrived
            answer = self._current()
        assert answer.status_code == 200, answer.text
        version = answer.json()["version"]
        assert version == max(self.versions) + 1
        assert list(answer.json()["probabilities"].values()) == pytest.approx(target)
        self.versions[version] = target
        self._etag = answer.headers["ETag"]

    def _current(self):
        return self.insist("GET", "/priors/default")[0]


def test_what_was_acknowledged_under_load_is_there_once_after_every_kill(service, pixels):
    client = service.start()
    where = {"url": str(client.base_url).rstrip("/")}
    labellers = [Labeller(where, png(pixels), seed) for seed in range(LABELLERS)]
    setter = Setter(where, LABELLERS)
    clients = [*labellers, setter]
    for one in clients:
        one.start()
    moments = random.Random(5)
    for _ in range(KILLS):
        known = len(setter.versions), sum(len(one.labelled) for one in labellers)
        while (len(setter.versions), sum(len(one.labelled) for one in labellers)) == known:
            assert all(one.is_alive() for one in clients), [one.failure for one in clients]
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        service.kill()
        client = service.start()
        where["url"] = str(client.base_url).rstrip("/")
    for one in clients:
        one.stop()
    service.kill()
    client = service.start()

    versions = client.get("/priors/default/versions").json()["versions"]
    assert {one["version"]: list(one["probabilities"].values()) for one in versions} == {
        version: pytest.approx(target) for version, target in setter.versions.items()
    }
    for one in labellers:
        for identity, answer in one.answered.items():
            found = client.get(f"/predictions/{identity}").json()
            assert found["predictions"] == answer["predictions"]
            assert (found["model"], found["adjustment"]) == (answer["model"], answer["adjustment"])
            assert [label["label"] for label in found["labels"]] == one.labelled.get(identity, [])
    answered = sum(len(one.answered) for one in labellers)
    labelled = sum(len(one.labelled) for one in labellers)
    receipts = sum(len(labels) for one in labellers for labels in one.labelled.values())
    cut_off = sum(one.cut_off for one in labellers)
    report = client.get("/monitor").json()
    assert report["labels"] == labelled
    unheard = report["predictions"] - answered
    assert 0 <= unheard <= cut_off
    assert not [line for line in service.log() if line["level"] in {"error", "critical"}]
    print(
        f"{KILLS} kills; acknowledged: {answered} predictions, {receipts} labels, {len(setter.versions) - 1} "
        f"versions of priors; none lost, none doubled; predictions that nobody was told of: {unheard}"
    )

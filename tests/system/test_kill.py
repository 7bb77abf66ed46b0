"""kill -9 between every two steps: what was acknowledged is found again, and counts once."""

import threading

import httpx
import numpy as np
import pytest

from tests import tiny
from tests.tiny import png

pytestmark = pytest.mark.slow


def restarted(service):
    service.kill()
    return service.start()


def test_acknowledged_state_survives_a_kill_between_every_two_steps(service, pixels):
    image = png(pixels)
    client = service.start()
    target = {"red": 0.1, "green": 0.2, "blue": 0.3, "grey": 0.4}

    answer = client.put("/priors", json={"probabilities": target, "note": "by hand", "author": "me"})
    assert (answer.status_code, answer.json()["version"]) == (200, 2)
    etag = answer.headers["ETag"]

    client = restarted(service)
    current = client.get("/priors/default")
    assert current.headers["ETag"] == etag
    assert current.json()["probabilities"] == pytest.approx(target)
    assert (current.json()["note"], current.json()["author"]) == ("by hand", "me")

    predicted = client.post("/predict?tau=1&top_k=4", content=image).json()
    assert predicted["adjustment"]["priors"] == {"name": "default", "version": 2}
    scores = (
        tiny.logits(pixels[None])[0] + np.log(list(target.values())) - np.log(tiny.manifest().source_prior)
    )
    got = {entry["index"]: entry["score"] for entry in predicted["predictions"][0]["top"]}
    np.testing.assert_allclose([got[i] for i in range(4)], scores, atol=1e-4)
    identity = predicted["predictions"][0]["prediction_id"]

    client = restarted(service)
    found = client.get(f"/predictions/{identity}").json()
    assert found["predictions"][0] == predicted["predictions"][0]
    assert (found["model"], found["adjustment"]) == (predicted["model"], predicted["adjustment"])
    assert found["labels"] == []
    feedback = {"prediction_id": identity, "label": "blue"}
    assert client.post("/feedback", json=feedback).json()["accepted"] == 1

    client = restarted(service)
    assert client.post("/feedback", json=feedback).json()["unchanged"] == 1
    assert client.post("/feedback", json={**feedback, "label": "red"}).json()["corrected"] == 1

    client = restarted(service)
    report = client.get("/monitor").json()
    assert (report["labels"], report["predictions"]) == (1, 1)
    labels = client.get(f"/predictions/{identity}").json()["labels"]
    assert [one["label"] for one in labels][-1] == "red"
    rolled = client.post("/priors/default/rollback", json={"version": 1})
    assert rolled.json()["version"] == 3

    client = restarted(service)
    assert client.get("/priors/default").json()["version"] == 3
    versions = client.get("/priors/default/versions").json()["versions"]
    assert [one["version"] for one in versions] == [3, 2, 1]
    after = client.post("/predict?tau=1&top_k=4", content=image).json()["adjustment"]["priors"]
    assert after == {"name": "default", "version": 3}


def test_what_was_answered_in_a_storm_is_there_after_a_kill(service, pixels):
    """Clients predict and label at once until the process dies; every answer that they got must hold."""
    client = service.start()
    image = png(pixels)
    answered, labelled, lock = [], [], threading.Lock()
    url = str(client.base_url)

    def storm():
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as own:
            try:
                while True:
                    identity = own.post("/predict", content=image).json()["predictions"][0]["prediction_id"]
                    with lock:
                        answered.append(identity)
                    receipt = own.post("/feedback", json={"prediction_id": identity, "index": 1}).json()
                    if receipt["accepted"]:
                        with lock:
                            labelled.append(identity)
            except (httpx.HTTPError, ValueError):
                return  # the process is gone

    threads = [threading.Thread(target=storm) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(labelled) < 50:
        assert any(thread.is_alive() for thread in threads)
    service.kill()
    for thread in threads:
        thread.join()
    client = service.start()
    for identity in answered:
        assert client.get(f"/predictions/{identity}").status_code == 200, identity
    for identity in labelled:
        assert len(client.get(f"/predictions/{identity}").json()["labels"]) == 1
    # A kill may leave what nobody was told of: one request of each client at most.
    report = client.get("/monitor").json()
    assert len(labelled) <= report["labels"] <= len(labelled) + len(threads)
    assert len(answered) <= report["predictions"] <= len(answered) + len(threads)


def test_decisions_follow_the_formula_while_priors_change_under_them(service, pixels):
    """Each answer names the version it used, and fits exactly that version, whatever shares its batch."""
    client = service.start()
    image, logits = png(pixels), tiny.logits(pixels[None])[0]
    rng = np.random.default_rng(11)
    targets = {1: np.full(4, 0.25)}
    url = str(client.base_url)
    done = threading.Event()
    failures = []

    def ask(seed):
        taus = np.random.default_rng(seed)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as own:
            while not done.is_set():
                tau = round(float(taus.uniform(0, 4)), 3)
                body = own.post(f"/predict?tau={tau}&top_k=4", content=image).json()
                version = body["adjustment"]["priors"]["version"]
                answers.append((tau, version, body["predictions"][0]["top"]))

    answers = []
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        target = rng.dirichlet(np.ones(4))
        body = client.put("/priors", json={"probabilities": target.tolist()}).json()
        targets[body["version"]] = target
        own = client.post("/predict?tau=1", content=image).json()["adjustment"]["priors"]["version"]
        if own < body["version"]:
            failures.append((own, body["version"]))
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(answers) > 20
    source = np.array(tiny.manifest().source_prior)
    for tau, version, top in answers:
        scores = logits + tau * (np.log(targets[version]) - np.log(source))
        got = {entry["index"]: entry["score"] for entry in top}
        np.testing.assert_allclose([got[i] for i in range(4)], scores, atol=1e-4)

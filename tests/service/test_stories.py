"""Requests in any order: what each answers follows from what was answered before, kept in a few lists."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests import tiny
from tests.service import v2

IMAGES = [tiny.png(pixels) for pixels in v2.noise(3)]
NAMES = st.sampled_from(["a", "b"])
STORIES = itertools.count()  # each has names of its own, for all have one service


class Story(RuleBasedStateMachine):
    """One client's doings: predictions, their labels, and priors by name, each version ever made."""

    client = None

    @initialize()
    def begin(self):
        self.number = next(STORIES)
        self.made = {}  # by name, the probabilities of every version
        self.gone = {}  # by name, how many of them went with a deletion
        self.there = set()
        self.labels = {}
        self.before = self.client.get("/monitor").json()
        self.predictions = []

    def named(self, method, name, path="", **sent):
        return self.client.request(method, f"/priors/{self.whole(name)}{path}", **sent)

    def whole(self, name):
        return f"story-{self.number}-{name}"

    def is_in_force(self, answer, name, probabilities):
        assert answer.status_code == 200, answer.text
        self.made.setdefault(name, []).append(probabilities)
        self.there.add(name)
        content = answer.json()
        assert (content["name"], content["version"]) == (self.whole(name), len(self.made[name]))
        assert list(content["probabilities"].values()) == pytest.approx(probabilities, abs=1e-12)

    @rule(name=NAMES, counts=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any))
    def put(self, name, counts):
        self.is_in_force(
            self.named("PUT", name, json={"counts": counts}), name, [one / sum(counts) for one in counts]
        )

    @rule(name=NAMES, version=st.integers(1, 6))
    def roll_back(self, name, version):
        answer = self.named("POST", name, "/rollback", json={"version": version})
        made = self.made.get(name, [])
        if name in self.there and self.gone.get(name, 0) < version <= len(made):
            self.is_in_force(answer, name, made[version - 1])
        else:
            assert answer.status_code == 404

    @rule(name=NAMES)
    def delete(self, name):
        answer = self.named("DELETE", name)
        assert answer.status_code == (204 if name in self.there else 404)
        if name in self.there:
            self.there.remove(name)
            self.gone[name] = len(self.made[name])

    @rule(image=st.integers(0, 2), name=NAMES, by_v2=st.booleans())
    def predict(self, image, name, by_v2):
        if by_v2:
            answer = v2.post(
                self.client, *v2.images([IMAGES[image]], parameters={"priors": self.whole(name), "tau": 1})
            )
        else:
            answer = self.client.post(f"/predict?tau=1&priors={self.whole(name)}", content=IMAGES[image])
        if name not in self.there:
            assert answer.status_code == 404
            return
        assert answer.status_code == 200
        if by_v2:
            identity = v2.outputs(answer)["prediction_id"][0]
            version = answer.json()["parameters"]["priors_version"]
        else:
            identity = answer.json()["predictions"][0]["prediction_id"]
            version = answer.json()["adjustment"]["priors"]["version"]
        assert version == len(self.made[name])
        self.predictions.append(identity)

    @precondition(lambda self: self.predictions)
    @rule(place=st.integers(0, 2), index=st.integers(0, 4))
    def label(self, place, index):
        identity = self.predictions[place % len(self.predictions)]
        answer = self.client.post("/feedback", json={"prediction_id": identity, "index": index})
        if index == 4:
            assert answer.status_code == 422
            return
        known = self.labels.get(identity)
        word = "accepted" if known is None else "unchanged" if known == index else "corrected"
        assert answer.json()[word] == 1
        self.labels[identity] = index
        stored = self.client.get(f"/predictions/{identity}").json()
        assert stored["labels"][-1]["index"] == index

    @invariant()
    def the_priors_are_those_that_were_made(self):
        shown = {one["name"]: one["version"] for one in self.client.get("/priors").json()["priors"]}
        mine = {name: version for name, version in shown.items() if name.startswith(self.whole(""))}
        assert mine == {self.whole(name): len(self.made[name]) for name in self.there}

    def teardown(self):
        after = self.client.get("/monitor").json()
        assert after["predictions"] - self.before["predictions"] == len(self.predictions)
        assert after["labels"] - self.before["labels"] == len(self.labels)
        assert math.isfinite(after["balanced_error"]["high"])


@pytest.mark.slow
def test_in_any_order_of_requests_nothing_is_lost_counted_twice_or_numbered_anew(lasting_client):
    class Told(Story):
        client = lasting_client

    run_state_machine_as_test(
        Told,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )

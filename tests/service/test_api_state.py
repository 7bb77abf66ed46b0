"""The routes of priors, feedback and predictions, as a client sees them."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import numpy as np
import pytest

from service.api.tokens import Tokens
from tests.contracts.calls import run
from tests.recorded import LABELS, START, TurnedClock, model, prediction, uuid7
from tests.service.problems import problem
from tests.service.state_app import serving

TINY = model()
PAIR = model("pair", labels=("cat", "dog"))


@pytest.fixture
def clock():
    return TurnedClock()


@pytest.fixture
def client(tmp_path, clock):
    with serving(tmp_path, TINY, PAIR, clock=clock) as client:
        yield client


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """A client shared by the tests that change nothing, or nothing that another one looks at."""
    with serving(tmp_path_factory.mktemp("steady"), TINY, PAIR, clock=TurnedClock()) as client:
        yield client


def recorded(client, of=TINY, **more):
    made = prediction(of, **more)
    run(client.parts.store.record([made]))
    return made


def give(client, *items):
    return client.post("/feedback", json={"items": list(items)})


# Priors

FIRST = dict.fromkeys(LABELS, 0.25)


def test_the_default_priors_are_uniform_at_first(client):
    # The default model is the first by name: pair.
    assert client.get("/priors", params={"model": "tiny"}).json() == {
        "priors": [
            {"name": "default", "version": 1, "created": "2026-05-01T12:00:00Z", "note": None, "author": None}
        ]
    }
    got = client.get("/priors/default", params={"model": "tiny"})
    assert got.json() == {
        "name": "default", "version": 1, "created": "2026-05-01T12:00:00Z", "note": None, "author": None,
        "probabilities": FIRST,
    }  # fmt: skip
    assert client.get("/priors/default").json()["probabilities"] == {"cat": 0.5, "dog": 0.5}


def test_a_put_is_answered_with_the_new_version_and_its_tag(client):
    before = client.get("/priors/default").headers["etag"]
    made = client.put("/priors", json={"counts": {"cat": 3, "dog": 1}, "note": "night", "author": "me"})
    assert made.status_code == 200
    body = made.json()
    assert (body["version"], body["note"], body["author"]) == (2, "night", "me")
    assert body["probabilities"] == {"cat": 0.75, "dog": 0.25}
    tag = made.headers["etag"]
    assert tag != before and tag.startswith('"')
    got = client.get("/priors/default")
    assert got.json() == body and got.headers["etag"] == tag


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"counts": [3, 1]}, [0.75, 0.25]),
        ({"counts": [2, 0], "smoothing": 1}, [0.75, 0.25]),
        ({"probabilities": [0.2, 0.8]}, [0.2, 0.8]),
        ({"probabilities": {"dog": 0.8, "cat": 0.2}}, [0.2, 0.8]),
        ({"uniform": True}, [0.5, 0.5]),
        ({"source": True}, PAIR.source_prior.tolist()),
    ],
)
def test_every_form_of_a_body_is_taken(steady, body, expected):
    made = steady.put("/priors/night", json=body)
    np.testing.assert_allclose(list(made.json()["probabilities"].values()), expected)


@pytest.mark.parametrize(
    ("body", "label"),
    [
        (b'{"probabilities": [0.5, 0.6]}', None),
        (b'{"probabilities": [NaN, 1]}', None),
        (b'{"probabilities": [1e999, 1]}', None),
        (b'{"probabilities": [-0.5, 1.5]}', "cat"),
        (b'{"probabilities": {"cat": 1}}', "dog"),
        (b'{"probabilities": {"cat": 0.5, "dog": 0.5, "cow": 0}}', "cow"),
        (b'{"counts": {"cat": 1, "cat": 1, "dog": 1}}', None),
        (b'{"counts": [0, 0]}', None),
        (b'{"counts": [1]}', None),
        (b'{"counts": [1, 2], "smoothing": -1}', None),
        (b'{"counts": [1, 2], "uniform": true}', None),
        (b'{"counts": "many"}', None),
        (b'{"counts": [1, "2"]}', None),
        (b'{"counts": [1, null]}', None),
        (b'{"counts": [true, false]}', None),
        (b'{"uniform": false}', None),
        (b'{"uniform": 1}', None),
        (b"{}", None),
        (b"[]", None),
        (b'{"uniform": true, "smoothing": 1}', None),
        (b'{"uniform": true, "nots": "x"}', None),
        (b'{"uniform": true, "note": "' + b"x" * 1001 + b'"}', None),
        (b'{"uniform": true, "note": 3}', None),
    ],
)
def test_a_body_that_is_no_prior_is_a_422_and_changes_nothing(steady, body, label):
    answer = problem(steady.put("/priors", content=body), 422)
    if label is not None:
        assert answer["label"] == label and label in answer["detail"]
    assert steady.get("/priors/default").json()["version"] == 1


def test_what_is_no_json_is_a_400(steady):
    for body in (b"", b"{", b"\xff", b'{"uniform": true} x', b'{"uniform": true, "note": "\\ud800"}'):
        problem(steady.put("/priors", content=body), 400, "malformed-json")


def test_a_thousand_characters_of_note_are_taken(client):
    assert client.put("/priors", json={"uniform": True, "note": "ü" * 1000}).json()["note"] == "ü" * 1000


def test_preconditions_guard_every_change(client):
    tag = client.get("/priors/default").headers["etag"]
    second = client.put("/priors/default", json={"uniform": True}, headers={"If-Match": tag})
    assert second.status_code == 200
    fresh = second.headers["etag"]
    for stale in (tag, f"W/{fresh}", "nonsense", fresh.strip('"'), ""):
        headers = {"If-Match": stale}
        problem(client.put("/priors", json={"uniform": True}, headers=headers), 412)
        problem(client.post("/priors/default/rollback", json={"version": 1}, headers=headers), 412)
        problem(client.put("/priors/night", json={"uniform": True}, headers=headers), 412)
        problem(client.delete("/priors/night", headers=headers), 412)
    several = {"If-Match": f"{tag}, {fresh}"}
    third = client.post("/priors/default/rollback", json={"version": 1}, headers=several)
    assert third.status_code == 200 and third.json()["version"] == 3
    assert client.put("/priors", json={"uniform": True}, headers={"If-Match": "*"}).json()["version"] == 4


def test_if_none_match_only_makes(client):
    headers = {"If-None-Match": "*"}
    problem(client.put("/priors", json={"uniform": True}, headers=headers), 412)
    assert client.put("/priors/night", json={"uniform": True}, headers=headers).status_code == 200
    problem(client.put("/priors/night", json={"uniform": True}, headers=headers), 412)


def test_versions_are_listed_newest_first_and_can_be_gone_back_to(client):
    client.put("/priors", json={"counts": [1, 3]})
    client.put("/priors", json={"counts": [1, 1]})
    back = client.post("/priors/default/rollback", json={"version": 2})
    assert back.json()["version"] == 4 and back.json()["probabilities"] == {"cat": 0.25, "dog": 0.75}
    assert back.headers["etag"] == client.get("/priors/default").headers["etag"]
    versions = client.get("/priors/default/versions").json()["versions"]
    assert [one["version"] for one in versions] == [4, 3, 2, 1]
    assert versions[2]["probabilities"] == {"cat": 0.25, "dog": 0.75}
    problem(client.post("/priors/default/rollback", json={"version": 9}), 404, "priors-version-not-found")
    for body in (
        {},
        {"version": 0},
        {"version": "2"},
        {"version": 1.5},
        {"version": 10**30},
        {"version": None},
    ):
        problem(client.post("/priors/default/rollback", json=body), 422)


def test_a_name_is_deleted_for_good_but_its_numbers_are_not(client):
    client.put("/priors/night", json={"uniform": True})
    gone = client.delete("/priors/night")
    assert gone.status_code == 204 and gone.content == b""
    for path in ("/priors/night", "/priors/night/versions"):
        problem(client.get(path), 404, "priors-not-found")
    problem(client.delete("/priors/night"), 404)
    assert client.put("/priors/night", json={"uniform": True}).json()["version"] == 2
    problem(client.delete("/priors/default"), 409, "priors-default")


@pytest.mark.parametrize("name", [".hidden", "-x", "x" * 65, "a b", "a%0A", "%C3%A4"])
def test_a_bad_name_cannot_be_made(steady, name):
    problem(steady.put(f"/priors/{name}", json={"uniform": True}), 422)
    problem(steady.get(f"/priors/{name}"), 404)


def test_an_unknown_model_is_a_404_everywhere(steady):
    for response in (
        steady.get("/priors?model=nobody"),
        steady.put("/priors?model=nobody", json={"uniform": True}),
        steady.get("/monitor?model=nobody"),
        steady.get("/monitor/tau-curve?model=nobody"),
    ):
        problem(response, 404, "model-not-found")


def test_only_the_admin_changes_priors(tmp_path, clock):
    with serving(tmp_path, TINY, clock=clock, tokens=Tokens("secret", "plain")) as client:
        admin, user = ({"Authorization": f"Bearer {token}"} for token in ("secret", "plain"))
        changes = [
            lambda headers: client.put("/priors", json={"uniform": True}, headers=headers),
            lambda headers: client.put("/priors/night", json={"uniform": True}, headers=headers),
            lambda headers: client.post("/priors/night/rollback", json={"version": 1}, headers=headers),
            lambda headers: client.delete("/priors/night", headers=headers),
        ]
        for change in changes:
            problem(change({}), 401)
            problem(change(user), 403)
            assert change(admin).is_success
        problem(client.get("/priors"), 401)
        assert client.get("/priors", headers=user).is_success


# Feedback and predictions


def test_a_prediction_is_answered_as_it_was_with_its_labels(client, clock):
    made = recorded(client, decided=2)
    shown = client.get(f"/predictions/{made.id}").json()
    assert shown["model"] == {"name": "tiny", "version": TINY.version}
    assert shown["adjustment"] == {
        "method": "logit-adjustment", "tau": 1.5, "temperature": 1.25,
        "priors": {"name": "default", "version": 1},
    }  # fmt: skip
    (one,) = shown["predictions"]
    top = [
        {
            "label": LABELS[rank.index],
            "index": rank.index,
            "probability": rank.probability,
            "score": rank.score,
        }
        for rank in made.decision.top
    ]
    plain = made.decision.unadjusted
    assert one == {
        "prediction_id": str(made.id), **top[0], "top": top,
        "unadjusted": {"label": "grey", "index": 3, "probability": plain.probability},
    }  # fmt: skip
    assert shown["created"] == "2026-05-01T12:00:00Z" and shown["labels"] == []
    clock.turn(hours=1)
    give(client, {"prediction_id": str(made.id), "label": "blue", "labelled_at": "2026-05-01T15:00:00+02:00"})
    give(client, {"prediction_id": str(made.id), "index": 0})
    assert client.get(f"/predictions/{made.id}").json()["labels"] == [
        {
            "label": "blue",
            "index": 2,
            "received": "2026-05-01T13:00:00Z",
            "labelled_at": "2026-05-01T13:00:00Z",
        },
        {"label": "red", "index": 0, "received": "2026-05-01T13:00:00Z", "labelled_at": None},
    ]


@pytest.mark.parametrize("name", [str(uuid4()), "none", "0", "x" * 3000, "%00", "%ff"])
def test_an_unknown_prediction_is_a_404(steady, name):
    problem(steady.get(f"/predictions/{name}"), 404, "prediction-not-found")


def test_feedback_is_answered_with_what_became_of_it(client):
    made = [recorded(client) for _ in range(3)]
    ids = [str(one.id) for one in made]
    first = give(client, *({"prediction_id": one, "label": "red"} for one in ids))
    assert first.json() == {"accepted": 3, "corrected": 0, "unchanged": 0, "rejected": []}
    nobody = str(uuid7(START))
    old = str(uuid7(START - timedelta(days=100)))
    second = give(
        client,
        {"prediction_id": ids[0], "label": "red"},
        {"prediction_id": ids[1], "index": 1},
        {"prediction_id": ids[2], "label": "mauve"},
        {"prediction_id": nobody, "label": "red"},
        {"prediction_id": old, "label": "red"},
    )
    assert second.status_code == 200
    assert second.json() == {
        "accepted": 0, "corrected": 1, "unchanged": 1,
        "rejected": [
            {"position": 2, "prediction_id": ids[2], "code": "unknown-label"},
            {"position": 3, "prediction_id": nobody, "code": "prediction-not-found"},
            {"position": 4, "prediction_id": old, "code": "prediction-expired"},
        ],
    }  # fmt: skip
    assert [one.accepted for one in client.parts.observer.receipts] == [3, 0]


def test_a_single_object_is_one_item(steady):
    made = recorded(steady)
    answer = steady.post("/feedback", json={"prediction_id": str(made.id), "label": "red"})
    assert answer.json()["accepted"] == 1


def test_feedback_of_which_nothing_is_taken_is_a_422_that_says_why(steady):
    nobody = str(uuid4())
    answer = problem(give(steady, {"prediction_id": nobody, "label": "red"}), 422, "feedback-rejected")
    assert answer["rejected"] == [{"position": 0, "prediction_id": nobody, "code": "prediction-not-found"}]


@pytest.mark.parametrize(
    "change",
    [
        {"label": "red", "index": 0}, {}, {"label": 3}, {"index": "0"}, {"index": 1.0}, {"index": True},
        {"label": None}, {"label": "red", "sampling_probability": 0}, {"label": "red", "colour": 1},
        {"label": "red", "sampling_probability": 1.1}, {"label": "red", "sampling_probability": -0.5},
        {"label": "red", "sampling_probability": "0.5"}, {"label": "red", "labelled_at": "yesterday"},
        {"label": "red", "labelled_at": 1_700_000_000}, {"label": "red", "labelled_at": "2026-05-01"},
        {"label": "red", "labelled_at": "2026-05-01T12:00:00"},
        {"label": "red", "labelled_at": "0001-01-01T00:00:00+10:00"},
        {"label": "red", "labelled_at": "9999-12-31T23:59:59-10:00"},
        {"label": "red", "labelled_at": "2026-02-30T12:00:00Z"},
        {"label": "red", "prediction_id": "no id"}, {"label": "red", "prediction_id": 7},
        {"label": "red", "prediction_id": None},
    ],
)  # fmt: skip
def test_an_item_of_the_wrong_form_is_a_422_and_nothing_is_learned(steady, change):
    made = recorded(steady)
    good = {"prediction_id": str(made.id), "label": "red"}
    problem(give(steady, good, {"prediction_id": str(made.id), **change}), 422)
    problem(steady.post("/feedback", json={"prediction_id": str(made.id), **change}), 422)
    assert steady.get(f"/predictions/{made.id}").json()["labels"] == []


@pytest.mark.parametrize(
    "body",
    [
        b"[]", b"3", b'"x"', b"null", b"{}", b'{"items": []}', b'{"items": {}}', b'{"items": null}',
        b'{"items": [], "label": "red"}', b'{"items": [[]]}',
    ],
)  # fmt: skip
def test_a_body_without_items_is_a_422(steady, body):
    problem(steady.post("/feedback", content=body), 422)


@pytest.mark.parametrize("body", [b"", b"{", b"items"])
def test_a_feedback_body_that_is_no_json_is_a_400(steady, body):
    problem(steady.post("/feedback", content=body), 400)


def test_more_than_ten_thousand_items_are_a_413(steady):
    items = [{"prediction_id": str(uuid4()), "index": 0}] * 10_001
    problem(give(steady, *items), 413, "too-many-items")


@pytest.mark.slow
def test_ten_thousand_items_are_taken(client):
    made = [prediction(TINY) for _ in range(2500)]
    run(client.parts.store.record(made))
    items = [{"prediction_id": str(one.id), "label": label} for label in LABELS for one in made]
    answer = give(client, *items)
    assert answer.json() == {"accepted": 2500, "corrected": 7500, "unchanged": 0, "rejected": []}


def test_the_smallest_sampling_probability_does_no_harm(client):
    made = recorded(client)
    item = {"prediction_id": str(made.id), "label": "blue", "sampling_probability": 5e-324}
    assert give(client, item).json()["accepted"] == 1
    other = recorded(client)
    give(client, {"prediction_id": str(other.id), "label": "blue", "sampling_probability": 1})
    shown = client.get("/monitor?model=tiny")
    assert shown.status_code == 200 and shown.json()["traffic_error"]["error"] == 1


def test_labels_survive_a_restart_and_a_model_that_is_gone(tmp_path, clock):
    with serving(tmp_path, TINY, PAIR, clock=clock) as client:
        made = recorded(client, decided=1)
    with serving(tmp_path, PAIR, clock=clock) as client:
        assert give(client, {"prediction_id": str(made.id), "label": "red"}).json()["accepted"] == 1
        problem(client.get("/priors?model=tiny"), 404)
        shown = client.get("/monitor?model=tiny").json()
        assert (shown["predictions"], shown["labels"], shown["balanced_error"]["error"]) == (1, 1, 1.0)
        assert client.get("/monitor?model=tiny&tau=0").json()["basis"] == "replayed"
        assert client.get(f"/predictions/{made.id}").json()["labels"][0]["label"] == "red"

"""The monitor: held to scikit-learn and to brute force on the same labels, and to what it must not claim."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score

from longtail.intervals import wilson
from service.core.records import Group
from tests.contracts.calls import run
from tests.recorded import START, TurnedClock, item, model, prediction
from tests.service.problems import problem
from tests.service.state_app import serving

TINY = model()
WIDE = model("wide", version="a" * 16, labels=tuple(f"class-{i}" for i in range(30)))


@pytest.fixture
def clock():
    return TurnedClock()


@pytest.fixture
def client(tmp_path, clock):
    with serving(tmp_path, TINY, WIDE, clock=clock) as client:
        yield client


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """A client for what changes nothing."""
    with serving(tmp_path_factory.mktemp("steady"), TINY, WIDE, clock=TurnedClock()) as client:
        yield client


def fill(client, of=WIDE, n=600, labelled=0.6, seed=4, probabilities=None):
    """Record traffic with a long tail, and label some of it; return the labelled rows as arrays."""
    rng = np.random.default_rng(seed)
    n_classes = len(of.labels)
    truth = rng.choice(n_classes, n, p=of.source_prior)
    logits = rng.normal(0, 1.5, (n, n_classes))
    logits[np.arange(n), truth] += 2.0
    decided = (logits + of.logit_offset).argmax(axis=1)
    made = [
        prediction(of, START + timedelta(minutes=i), int(decided[i]), logits[i].astype(np.float16))
        for i in range(n)
    ]
    run(client.parts.store.record(made))
    rows = np.flatnonzero(rng.random(n) < labelled)
    chosen = np.ones(len(rows)) if probabilities is None else rng.choice(probabilities, len(rows))
    items = [
        item(made[row], int(truth[row]), sampling_probability=None if probabilities is None else float(p))
        for row, p in zip(rows, chosen, strict=True)
    ]
    run(client.parts.store.learn(items, START))
    return {
        "truth": truth[rows],
        "decided": decided[rows],
        "logits": logits[rows].astype(np.float16),
        "all_logits": logits.astype(np.float16),
        "all_decided": decided,
        "weights": 1 / chosen,
        "made": made,
    }


def shown(client, path="/monitor", **parameters):
    response = client.get(path, params={"model": "wide", **parameters})
    assert response.status_code == 200, response.text
    return response.json()


def errors_by_scikit_learn(truth, decided, n_classes, weights=None):
    recall = recall_score(
        truth, decided, labels=range(n_classes), average=None, sample_weight=weights, zero_division=np.nan
    )
    return 1 - recall


def test_every_error_is_scikit_learns_on_the_same_labels(client):
    rows = fill(client)
    report = shown(client)
    errors = errors_by_scikit_learn(rows["truth"], rows["decided"], 30)
    counts = np.bincount(rows["truth"], minlength=30)
    assert report["basis"] == "served" and report["labels"] == len(rows["truth"])
    for entry, error, count in zip(report["classes"], errors, counts, strict=True):
        assert entry["labels"] == count
        assert entry["error"] == (None if math.isnan(error) else pytest.approx(error))
    present = np.unique(rows["truth"])
    balanced = 1 - recall_score(rows["truth"], rows["decided"], labels=present, average="macro")
    assert report["balanced_error"]["error"] == pytest.approx(balanced)
    assert report["traffic_error"]["error"] == pytest.approx(
        1 - accuracy_score(rows["truth"], rows["decided"])
    )
    assert [entry["group"] for entry in report["groups"]] == ["many", "medium", "few"]
    for group, entry in zip(WIDE.groups, report["groups"], strict=True):
        mine = errors[list(group.indices)]
        assert entry["error"] == pytest.approx(np.nanmean(mine))
        assert entry["classes"] == len(mine)
        assert entry["classes_with_labels"] == np.isfinite(mine).sum()
        assert entry["labels"] == counts[list(group.indices)].sum()


def test_labels_weigh_by_how_likely_they_were_to_be_taken(client):
    rows = fill(client, probabilities=[0.1, 0.5, 1.0])
    report = shown(client)
    expected = 1 - accuracy_score(rows["truth"], rows["decided"], sample_weight=rows["weights"])
    assert report["traffic_error"]["error"] == pytest.approx(expected)
    assert report["traffic_error"]["error"] != pytest.approx(
        1 - accuracy_score(rows["truth"], rows["decided"])
    )
    kish = rows["weights"].sum() ** 2 / (rows["weights"] ** 2).sum()
    interval = wilson(expected, kish)
    assert report["traffic_error"]["low"] == pytest.approx(interval.low)
    assert report["traffic_error"]["high"] == pytest.approx(interval.high)
    errors = errors_by_scikit_learn(rows["truth"], rows["decided"], 30, rows["weights"])
    for entry, error in zip(report["classes"], errors, strict=True):
        assert entry["error"] == (None if math.isnan(error) else pytest.approx(error))
    assert report["balanced_error"]["error"] == pytest.approx(np.nanmean(errors))


def test_decisions_are_counted_labelled_or_not(client):
    rows = fill(client, labelled=0.1)
    report = shown(client)
    assert report["predictions"] == 600
    counted = [entry["predicted"] for entry in report["classes"]]
    assert counted == np.bincount(rows["all_decided"], minlength=30).tolist()


def scored(logits, of, prior, tau):
    """The formula, class by class, without the library."""
    total = []
    for y in range(len(of.labels)):
        score = float(logits[y]) + of.logit_offset[y]
        if tau > 0:
            q = prior[y]
            score = -math.inf if q == 0 else score + tau * (math.log(q) - math.log(of.source_prior[y]))
        total.append(score)
    return total.index(max(total))


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """A client with labelled traffic and the priors `slope`, and the labelled rows."""
    with serving(tmp_path_factory.mktemp("replayed"), WIDE, clock=TurnedClock()) as client:
        rows = fill(client, n=400)
        client.put("/priors/slope?model=wide", json={"counts": list(range(30))})
        yield client, rows


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.5, 10.0])
def test_a_replay_decides_by_the_formula_from_the_logits_that_were_kept(replayed, tau):
    client, rows = replayed
    report = shown(client, tau=tau, priors="slope")
    assert report["basis"] == "replayed" and report["tau"] == tau
    assert report["priors"] == {"name": "slope", "version": 1}
    prior = np.arange(30) / np.arange(30).sum()
    decided = [scored(logits, WIDE, prior, tau) for logits in rows["logits"]]
    errors = errors_by_scikit_learn(rows["truth"], decided, 30)
    for entry, error in zip(report["classes"], errors, strict=True):
        assert entry["error"] == (None if math.isnan(error) else pytest.approx(error))
    every = [scored(logits, WIDE, prior, tau) for logits in rows["all_logits"]]
    assert [entry["predicted"] for entry in report["classes"]] == np.bincount(every, minlength=30).tolist()
    assert report["predictions"] == 400
    if tau > 0:
        assert report["classes"][0]["predicted"] == 0  # its target is zero


def test_a_replay_fills_in_what_is_served_by_default(client):
    fill(client, n=200)
    client.put("/priors?model=wide", json={"source": True})
    by_name, by_tau = shown(client, priors="default"), shown(client, tau=WIDE.tau)
    assert by_name == by_tau
    assert (by_name["tau"], by_name["priors"]) == (WIDE.tau, {"name": "default", "version": 2})
    problem(client.get("/monitor?model=wide&priors=nothing"), 404, "priors-not-found")


def test_the_curve_has_the_points_of_the_replays_and_suggests_nothing(client):
    fill(client, n=300)
    client.put("/priors/night?model=wide", json={"counts": list(range(1, 31))})
    curve = shown(client, "/monitor/tau-curve", priors="night")
    assert curve["model"] == {"name": "wide", "version": "a" * 16}
    assert (curve["priors"], curve["served_tau"], curve["suggestion"]) == (
        {"name": "night", "version": 1},
        1.5,
        None,
    )
    taus = [point["tau"] for point in curve["points"]]
    assert taus == [step / 10 for step in range(31)]
    for point in curve["points"][::10]:
        replay = shown(client, tau=point["tau"], priors="night")
        assert (point["balanced_error"], point["groups"]) == (replay["balanced_error"], replay["groups"])
        assert curve["labels"] == replay["labels"]


def test_a_served_tau_beside_the_grid_is_a_point_of_its_own(tmp_path, clock):
    odd = replace(TINY, tau=3.25)
    with serving(tmp_path, odd, clock=clock) as client:
        curve = client.get("/monitor/tau-curve").json()
    assert curve["served_tau"] == 3.25
    assert [point["tau"] for point in curve["points"]] == [*(step / 10 for step in range(31)), 3.25]


def test_without_labels_nothing_is_known_and_nothing_is_zero(client):
    made = [prediction(WIDE, decided=2) for _ in range(3)]
    run(client.parts.store.record(made))
    for report in (shown(client), shown(client, tau=1)):
        assert (report["predictions"], report["labels"]) == (3, 0)
        nothing = {"error": None, "low": 0.0, "high": 1.0, "labels": 0}
        assert report["traffic_error"] == nothing
        for entry in (report["balanced_error"], *report["groups"], *report["classes"]):
            assert {key: entry[key] for key in nothing} == nothing
        assert report["balanced_error"]["low_all"] == 0 and report["balanced_error"]["high_all"] == 1
        assert (report["balanced_error"]["classes"], report["balanced_error"]["classes_with_labels"]) == (
            30,
            0,
        )
    curve = shown(client, "/monitor/tau-curve")
    assert curve["labels"] == 0 and curve["points"][0]["balanced_error"]["error"] is None


def test_a_model_that_served_nothing_is_answered_with_nothing(steady):
    report = shown(steady)
    assert (report["predictions"], report["labels"], report["since"], report["until"]) == (0, 0, None, None)


def test_classes_without_labels_widen_the_interval_for_all(client):
    made = [prediction(TINY, decided=0) for _ in range(40)]
    run(client.parts.store.record(made))
    run(client.parts.store.learn([item(one, i % 2) for i, one in enumerate(made)], START))
    balanced = shown(client, model="tiny")["balanced_error"]
    assert (balanced["error"], balanced["classes"], balanced["classes_with_labels"]) == (0.5, 4, 2)
    assert balanced["low_all"] == pytest.approx(balanced["low"] / 2)
    assert balanced["high_all"] == pytest.approx(balanced["high"] / 2 + 0.5)
    many = shown(client, model="tiny")["groups"][0]
    assert many["group"] == "many" and many["classes"] == 1
    assert (many["low"], many["high"]) == (many["low_all"], many["high_all"])
    one = shown(client, model="tiny")["classes"][0]
    assert (many["low"], many["high"]) == pytest.approx((one["low"], one["high"]))


def test_groups_are_the_models_own_and_an_empty_one_is_left_out(tmp_path, clock):
    own = replace(TINY, groups=(Group("warm", (0,)), Group("none", ()), Group("cold", (1, 2, 0))))
    with serving(tmp_path, own, clock=clock) as client:
        report = client.get("/monitor").json()
    assert [group["group"] for group in report["groups"]] == ["warm", "cold"]
    assert [entry["group"] for entry in report["classes"]] == ["warm", "cold", "cold", None]


def test_a_correction_moves_a_label_and_does_not_add_one(client):
    made = prediction(TINY, decided=0)
    run(client.parts.store.record([made]))
    run(client.parts.store.learn([item(made, 0)], START))
    before = shown(client, model="tiny")
    run(client.parts.store.learn([item(made, 2)], START))
    after = shown(client, model="tiny")
    assert [one["labels"] for one in before["classes"]] == [1, 0, 0, 0]
    assert [one["labels"] for one in after["classes"]] == [0, 0, 1, 0]
    assert (before["traffic_error"]["error"], after["traffic_error"]["error"]) == (0, 1)


# Windows


def test_a_window_is_half_open_and_by_time_of_prediction(client, clock):
    hours = [START + timedelta(hours=h) for h in range(4)]
    made = [prediction(TINY, hour) for hour in hours]
    run(client.parts.store.record(made))
    run(client.parts.store.learn([item(one, 0) for one in made[1:]], START + timedelta(days=1)))

    def counted(**window):
        for basis in ({}, {"tau": 1}):
            report = shown(client, model="tiny", **window, **basis)
            counts = (report["predictions"], report["labels"])
        curve = shown(client, "/monitor/tau-curve", model="tiny", **window)
        assert curve["labels"] == counts[1]
        return counts

    assert counted() == (4, 3)
    assert counted(since="2026-05-01T13:00:00Z") == (3, 3)
    assert counted(until="2026-05-01T13:00:00Z") == (1, 0)
    assert counted(since="2026-05-01T13:00:00Z", until="2026-05-01T15:00:00Z") == (2, 2)
    assert counted(since="2026-05-01T15:00:00+02:00", until="2026-05-01T15:00:00Z") == (2, 2)
    assert counted(since="2026-05-01T13:00:00Z", until="2026-05-01T13:00:00Z") == (0, 0)
    assert counted(since="2026-05-01T13:00:00.000001Z") == (2, 2)
    clock.turn(hours=3, minutes=30)
    assert counted(last="1h") == (1, 1)
    assert counted(last="2h") == (2, 2)
    assert counted(last="7d") == (4, 3)
    report = shown(client, model="tiny", last="2h")
    assert (report["since"], report["until"]) == ("2026-05-01T13:30:00Z", None)
    assert shown(client, since="2026-05-01T15:00:00+02:00")["since"] == "2026-05-01T13:00:00Z"


@pytest.mark.parametrize(
    "query",
    [
        "since=2026-05-02T00:00:00Z&until=2026-05-01T00:00:00Z", "last=24h&since=2026-05-02T00:00:00Z",
        "last=24h&until=2026-05-02T00:00:00Z", "since=yesterday", "since=2026-05-01", "last=1y", "last=0h",
        "last=-1h", "last=", "since=", "tau=nan", "tau=-1", "tau=1e308", "tau=", "tau=1&tau=2", "colour=red",
        "since=0001-01-01T00:00:00%2B01:00", "until=9999-12-31T23:59:59-01:00", "last=999999999w",
    ],
)  # fmt: skip
def test_a_query_that_makes_no_sense_is_a_422(steady, query):
    problem(steady.get(f"/monitor?model=wide&{query}"), 422)
    problem(steady.get(f"/monitor/tau-curve?model=wide&{query}"), 422)


def test_the_ends_of_the_calendar_are_answered(steady):
    report = shown(steady, since="0001-01-01T00:00:00Z", until="9999-12-31T23:59:59Z")
    assert report["predictions"] == 0


# Versions


def test_versions_are_never_mixed_and_the_latest_loaded_answers(tmp_path, clock):
    old, new = model(version="0" * 16), model(version="1" * 16)
    with serving(tmp_path, old, clock=clock) as client:
        run(client.parts.store.record([prediction(old) for _ in range(3)]))
    clock.turn(hours=1)
    with serving(tmp_path, new, clock=clock) as client:
        run(client.parts.store.record([prediction(new) for _ in range(2)]))
        assert shown(client, model="tiny")["predictions"] == 2
        assert shown(client, model="tiny")["model"] == {"name": "tiny", "version": "1" * 16}
        assert shown(client, model="tiny", version="0" * 16)["predictions"] == 3
        assert (
            shown(client, "/monitor/tau-curve", model="tiny", version="0" * 16)["model"]["version"][0] == "0"
        )
        problem(client.get("/monitor?model=tiny&version=2"), 404, "version-not-found")
    clock.turn(hours=1)
    with serving(tmp_path, old, clock=clock) as client:
        assert shown(client, model="tiny")["predictions"] == 3


def test_the_default_model_answers_where_none_is_named(steady):
    assert steady.get("/monitor").json()["model"]["name"] == "tiny"


def test_replays_wait_for_each_other_and_all_are_answered(client):
    fill(client, n=500)

    async def together():
        monitor = client.parts.monitor
        chosen = [await monitor.select("wide", tau=tau) for tau in (0.0, 1.0, 2.0, 1.0)]
        return await asyncio.gather(*(monitor.report(one) for one in chosen))

    reports = run(together())
    assert reports[1].balanced == reports[3].balanced
    assert len({report.balanced.error for report in reports}) > 1

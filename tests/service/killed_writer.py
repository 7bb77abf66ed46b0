"""A child for the tests of `kill -9`: writes for ever, and prints a line for each acknowledged write."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from service.adapters.sql_store import SqlStore
from tests import recorded
from tests.service.stores import opened


def now() -> datetime:
    return datetime.now(UTC)


async def write(folder: Path) -> None:
    tiny = recorded.model()
    with opened(folder, now) as store:
        await store.register_model(tiny, now())
        versions = {one.name: one.version for one in await store.current_priors()}
        await asyncio.gather(
            *(predict_and_label(store, tiny, np.random.default_rng(seed)) for seed in range(6)),
            *(change_priors(store, f"name-{i}", versions.get(f"name-{i}")) for i in range(2)),
        )


async def predict_and_label(store: SqlStore, tiny: object, rng: np.random.Generator) -> None:
    while True:
        made = [
            recorded.prediction(tiny, now(), int(rng.integers(4))) for _ in range(int(rng.integers(1, 9)))
        ]
        await store.record(made)
        say(*(f"prediction {one.id} {one.decision.top[0].index}" for one in made))
        for one in made[:2]:
            for label in (0, 1):  # the second corrects the first
                await store.learn([recorded.item(one, label)], now())
                say(f"label {one.id} {label}")


async def change_priors(store: SqlStore, name: str, version: int | None) -> None:
    while True:
        version = (await store.add_prior(recorded.prior(name, note=f"after {version}"), version)).version
        say(f"prior {name} {version}")


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1])))

"""Calling a store from a test: to the end of what it does, and what it then holds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from service.core.ports import Store

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


async def blocks(found: Any) -> list[Any]:
    return [block async for block in found]


def labels_of(store: Store, one: Any) -> list[int]:
    found = run(store.prediction(one.id))
    assert found is not None
    return [label.index for label in found.labels]


@dataclass
class Recorded:
    """Predictions of one request."""

    predictions: list[Any]
    wanted: bool = True


def kept(store: Store, recordings: list[Recorded]) -> Exception | None:
    """Keep them, and return what is told of it."""
    told: list[Exception | None] = []
    done = threading.Event()

    def then(failure: Exception | None) -> None:
        told.append(failure)
        done.set()

    store.keep(recordings, then)
    assert done.wait(30)
    return told[0]

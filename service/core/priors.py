"""Named, versioned target priors: what traffic is said to look like, changed while it is served.

Every version is immutable. The current ones stand in memory, in one mapping that is replaced and never
changed, so a request reads its prior without waiting and keeps it to its end.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from longtail.priors import PriorError, checked_prior, prior_from_counts, uniform_prior
from service.core.exceptions import Conflict, Invalid, NotFound, Stale
from service.core.records import PriorVersion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from service.core.ports import Clock, Store
    from service.core.records import ModelVersion

DEFAULT: Final = "default"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Values = Mapping[str, float] | Sequence[float]
"""Numbers for every class: by label, or a list by index."""


@dataclass(frozen=True)
class PriorSpec:
    """What a new version is made of: exactly one of the first four.

    `source` copies the source prior of the model that is asked for. `smoothing` goes with `counts`.
    """

    counts: Values | None = None
    probabilities: Values | None = None
    uniform: bool = False
    source: bool = False
    smoothing: float | None = None
    note: str | None = None
    author: str | None = None


@dataclass(frozen=True)
class Precondition:
    """What must hold of the current version for a change to be made; None asks for nothing.

    `match`: it is one of these ETags ("*": there is one). `none_match`: it is none of these ("*": there is
    none).
    """

    match: frozenset[str] | None = None
    none_match: frozenset[str] | None = None

    def check(self, name: str, current: PriorVersion | None) -> None:
        """Raise Stale unless it holds."""
        tags = set() if current is None else {"*", etag(current)}
        if self.match is not None and not self.match & tags:
            raise Stale(
                "priors-changed",
                f"The priors {name!r} are not at the version that If-Match names; read them and try again.",
            )
        if self.none_match is not None and self.none_match & tags:
            raise Stale(
                "priors-exist", f"The priors {name!r} exist, and If-None-Match asks that they do not."
            )


NO_PRECONDITION: Final = Precondition()


class Priors:
    """The current version of every name, and the only way to change it."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._current: Mapping[tuple[str, str], PriorVersion] = {}
        self._changing = asyncio.Lock()

    async def load(self, label_sets: Mapping[str, Sequence[str]]) -> None:
        """Read what the store has, and make `default` uniform for each label set that has none."""
        found = await self._store.current_priors()
        self._current = {(one.label_set, one.name): one for one in found}
        for label_set, labels in label_sets.items():
            if (label_set, DEFAULT) not in self._current:
                uniform = uniform_prior(len(labels))
                await self._add(
                    PriorVersion(label_set, DEFAULT, 0, uniform, self._clock(), None, None), NO_PRECONDITION
                )

    def current(self, label_set: str, name: str) -> PriorVersion:
        """Return the version in force. Raises NotFound."""
        found = self._current.get((label_set, name))
        if found is None:
            raise NotFound("priors-not-found", f"There are no priors {name[:64]!r}; GET /priors lists them.")
        return found

    def all(self, label_set: str) -> list[PriorVersion]:
        """Return the version in force of every name, by name."""
        mine = [one for (owner, _), one in self._current.items() if owner == label_set]
        return sorted(mine, key=lambda one: one.name)

    async def versions(self, label_set: str, name: str) -> Sequence[PriorVersion]:
        """Return all versions of a name, newest first. Raises NotFound."""
        self.current(label_set, name)
        return await self._store.prior_versions(label_set, name)

    async def put(
        self,
        model: ModelVersion,
        name: str,
        spec: PriorSpec,
        precondition: Precondition = NO_PRECONDITION,
    ) -> PriorVersion:
        """Make a new version for the label set of this model, and return it once it is on disk and in force.

        Raises Invalid, naming the label at fault, and Stale.
        """
        if not _NAME.fullmatch(name):
            raise Invalid(
                "invalid-priors-name",
                "A priors name is 1 to 64 letters, digits, dots, hyphens and underscores, "
                "and begins with a letter or digit.",
                parameter="name",
            )
        wanted = PriorVersion(
            label_set=model.label_set,
            name=name,
            version=0,
            probabilities=_probabilities(spec, model),
            created=self._clock(),
            note=spec.note,
            author=spec.author,
        )
        return await self._add(wanted, precondition)

    async def rollback(
        self,
        label_set: str,
        name: str,
        version: int,
        precondition: Precondition = NO_PRECONDITION,
    ) -> PriorVersion:
        """Make a new version equal to an earlier one. Raises NotFound and Stale."""
        precondition.check(name, self._current.get((label_set, name)))
        self.current(label_set, name)
        earlier = await self._store.prior_version(label_set, name, version)
        if earlier is None:
            raise NotFound(
                "priors-version-not-found",
                f"The priors {name!r} have no version {version}; GET /priors/{name}/versions lists them.",
            )
        return await self._add(replace(earlier, created=self._clock()), precondition)

    async def delete(self, label_set: str, name: str, precondition: Precondition = NO_PRECONDITION) -> None:
        """Delete a name; its numbers are never given again. Raises Conflict, NotFound, Stale."""
        if name == DEFAULT:
            raise Conflict("priors-default", "The default priors cannot be deleted; change them instead.")
        async with self._changing:
            while True:
                present = self._current.get((label_set, name))
                precondition.check(name, present)
                try:
                    await self._store.delete_prior(label_set, name, self.current(label_set, name).version)
                except Stale:
                    await self._refresh(label_set, name)
                else:
                    self._replace(label_set, name, None)
                    return

    async def _add(self, wanted: PriorVersion, precondition: Precondition) -> PriorVersion:
        """Add a version after whatever is current by then, as often as it takes."""
        label_set, name = wanted.label_set, wanted.name
        async with self._changing:
            while True:
                present = self._current.get((label_set, name))
                precondition.check(name, present)
                try:
                    added = await self._store.add_prior(wanted, None if present is None else present.version)
                except Stale:  # another process was faster
                    await self._refresh(label_set, name)
                else:
                    self._replace(label_set, name, added)
                    return added

    async def _refresh(self, label_set: str, name: str) -> None:
        versions = await self._store.prior_versions(label_set, name)
        self._replace(label_set, name, versions[0] if versions else None)

    def _replace(self, label_set: str, name: str, prior: PriorVersion | None) -> None:
        others = {key: one for key, one in self._current.items() if key != (label_set, name)}
        self._current = others if prior is None else {**others, (label_set, name): prior}


def etag(prior: PriorVersion) -> str:
    """Return the strong entity tag of this version, with its quotation marks; it says nothing by itself."""
    identity = f"{prior.label_set}\0{prior.name}\0{prior.version}\0{prior.created.isoformat()}"
    return f'"{hashlib.sha256(identity.encode() + prior.probabilities.tobytes()).hexdigest()[:32]}"'


def probabilities_of(
    values: Values | NDArray[np.float64], labels: Sequence[str], field: str
) -> NDArray[np.float64]:
    """Return a target prior (L,) from what a request says, by label or by index. Raises Invalid."""
    try:
        return checked_prior(_by_index(values, labels, field), len(labels))
    except PriorError as failure:
        raise _invalid(failure, labels, field) from failure


def _probabilities(spec: PriorSpec, model: ModelVersion) -> NDArray[np.float64]:
    given = [
        name
        for name, is_given in (
            ("counts", spec.counts is not None),
            ("probabilities", spec.probabilities is not None),
            ("uniform", spec.uniform),
            ("source", spec.source),
        )
        if is_given
    ]
    if len(given) != 1:
        raise Invalid(
            "invalid-prior", "Give exactly one of counts, probabilities, uniform and source.", fields=given
        )
    if spec.smoothing is not None and spec.counts is None:
        raise Invalid("invalid-prior", "smoothing: it goes with counts only.", field="smoothing")
    labels = model.labels
    if spec.counts is not None:
        counts = _by_index(spec.counts, labels, "counts")
        if len(counts) != len(labels):
            raise Invalid(
                "invalid-prior", f"counts: {len(counts)} for {len(labels)} classes.", field="counts"
            )
        try:
            return prior_from_counts(counts, spec.smoothing or 0.0)
        except PriorError as failure:
            raise _invalid(failure, labels, "counts") from failure
    if spec.probabilities is not None:
        return probabilities_of(spec.probabilities, labels, "probabilities")
    return uniform_prior(len(labels)) if spec.uniform else model.source_prior


def _by_index(
    values: Values | NDArray[np.float64], labels: Sequence[str], field: str
) -> Sequence[float] | NDArray[np.float64]:
    if not isinstance(values, Mapping):
        return values
    known = set(labels)
    for label in values:
        if label not in known:
            raise Invalid(
                "invalid-prior",
                f"{field}: the model has no label {label[:100]!r}.",
                field=field,
                label=label,
            )
    for label in labels:
        if label not in values:
            raise Invalid(
                "invalid-prior", f"{field}: the label {label[:100]!r} is missing.", field=field, label=label
            )
    return [values[label] for label in labels]


def _invalid(failure: PriorError, labels: Sequence[str], field: str) -> Invalid:
    if failure.index is None:
        return Invalid("invalid-prior", f"{field}: {failure}", field=field)
    label = labels[failure.index] if failure.index < len(labels) else None
    where = f"{field}, label {label[:100]!r}" if label is not None else field
    return Invalid("invalid-prior", f"{where}: {failure}", field=field, label=label, index=failure.index)

"""Statements about priors: compare-and-set of versions, whose numbers never come twice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy import and_, case, func, insert, select, update

from service.adapters.sql_tables import priors, read_floats, read_time, stored_floats, stored_time
from service.core.exceptions import Stale
from service.core.records import PriorVersion

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any

    from sqlalchemy import Connection, Row


def current(connection: Connection) -> list[PriorVersion]:
    """Return the current version of every name of every label set."""
    newest = (
        select(priors.c.label_set, priors.c.name, func.max(priors.c.version).label("version"))
        .where(priors.c.deleted.is_(None))
        .group_by(priors.c.label_set, priors.c.name)
        .subquery()
    )
    same = [priors.c[column] == newest.c[column] for column in ("label_set", "name", "version")]
    rows = connection.execute(select(priors).join(newest, and_(*same)))
    return [_prior_version(row) for row in rows]


def versions(connection: Connection, label_set: str, name: str) -> list[PriorVersion]:
    """Return the versions of a name since it was last made, newest first; none if it is deleted."""
    rows = connection.execute(
        select(priors)
        .where(priors.c.label_set == label_set, priors.c.name == name, priors.c.deleted.is_(None))
        .order_by(priors.c.version.desc())
    )
    return [_prior_version(row) for row in rows]


def find(connection: Connection, label_set: str, name: str, version: int) -> PriorVersion | None:
    """Return one version of a name, or None; a deleted one is not found."""
    row = connection.execute(
        select(priors).where(
            priors.c.label_set == label_set,
            priors.c.name == name,
            priors.c.version == version,
            priors.c.deleted.is_(None),
        )
    ).one_or_none()
    return None if row is None else _prior_version(row)


def add(connection: Connection, prior: PriorVersion, replaces: int | None) -> PriorVersion:
    """Add a version above every number that the name ever had. Raises Stale unless `replaces` is current."""
    last = _check_current(connection, prior.label_set, prior.name, replaces)
    added = replace(prior, version=last + 1)
    connection.execute(
        insert(priors).values(
            label_set=added.label_set,
            name=added.name,
            version=added.version,
            probabilities=stored_floats(added.probabilities),
            created=stored_time(added.created),
            note=added.note,
            author=added.author,
        )
    )
    return added


def delete(connection: Connection, label_set: str, name: str, replaces: int, now: datetime) -> None:
    """Mark every version of a name as deleted. Raises Stale unless `replaces` is current."""
    _check_current(connection, label_set, name, replaces)
    connection.execute(
        update(priors)
        .where(priors.c.label_set == label_set, priors.c.name == name, priors.c.deleted.is_(None))
        .values(deleted=stored_time(now))
    )


def _check_current(connection: Connection, label_set: str, name: str, replaces: int | None) -> int:
    """Return the highest number ever given, 0 for none. Raises Stale unless `replaces` is current."""
    kept = case((priors.c.deleted.is_(None), priors.c.version))
    last, present = connection.execute(
        select(func.max(priors.c.version), func.max(kept)).where(
            priors.c.label_set == label_set, priors.c.name == name
        )
    ).one()
    if present != replaces:
        raise Stale("priors-changed", f"The priors {name!r} have changed meanwhile; read them and try again.")
    return last or 0


def _prior_version(row: Row[Any]) -> PriorVersion:
    return PriorVersion(
        label_set=row.label_set,
        name=row.name,
        version=row.version,
        probabilities=read_floats(row.probabilities),
        created=read_time(row.created),
        note=row.note,
        author=row.author,
    )

"""Rows of one noun as pydantic models: add, get by id or name, list, replace, remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from sqlalchemy import Engine, func, or_, select

from lorasmith.errors import Conflict, NotFound, did_you_mean
from lorasmith.faults import fault_point
from lorasmith.store.database import Record, reading, transaction

Noun = TypeVar("Noun", bound=BaseModel)


class Table(Generic[Noun]):
    """One noun's table. A name is unique among live rows unless `unique_names` is false (jobs, evaluations)."""

    def __init__(self, engine: Engine, record: type[Record], noun: type[Noun], *, unique_names: bool = True) -> None:
        self.engine = engine
        self.record = record
        self.noun = noun
        self.unique_names = unique_names

    @property
    def noun_name(self) -> str:
        return str(self.record.__tablename__).removesuffix("s")

    def add(self, row: Noun) -> Noun:
        """Insert a row; its files must exist already. Raises `Conflict` when the name is taken."""
        identity: Any = row
        with transaction(self.engine) as session:
            if self.unique_names:
                taken = session.scalar(select(self.record.id).where(self.record.name == identity.name))
                if taken is not None:
                    raise Conflict(
                        f"there is already a {self.noun_name} named {identity.name!r}",
                        hint=f"choose another name, or remove {taken} first",
                    )
            session.add(self.record(**self.columns(row)))
            session.flush()
            fault_point("row.adding")
        fault_point("row.added")
        return row

    def columns(self, row: Noun) -> dict[str, Any]:
        """What a row's table holds of it."""
        identity: Any = row
        return {"id": identity.id, "name": identity.name, "document": row.model_dump_json()}

    def save(self, *rows: Noun) -> None:
        """Insert or replace these rows together. Raises `Conflict` when a name is taken by a row that is not among them."""
        with transaction(self.engine) as session:
            for row in rows:
                session.merge(self.record(**self.columns(row)))
            session.flush()
            names = [identity.name for identity in rows]  # type: ignore[attr-defined]
            for name in names if self.unique_names else ():
                ids = session.scalars(select(self.record.id).where(self.record.name == name)).all()
                if len(ids) > 1:
                    raise Conflict(
                        f"there is already a {self.noun_name} named {name!r}", hint="another process made it: try again"
                    )

    def get(self, name_or_id: str) -> Noun | None:
        """The row with that id, or the newest with that name."""
        statement = (
            select(self.record.document)
            .where(or_(self.record.id == name_or_id, self.record.name == name_or_id))
            .order_by(self.record.id.desc())
            .limit(1)
        )
        with reading(self.engine) as session:
            document = session.scalar(statement)
        return None if document is None else self.noun.model_validate_json(document)

    def require(self, name_or_id: str) -> Noun:
        """Like `get`, but raises `NotFound` with the nearest name."""
        row = self.get(name_or_id)
        if row is None:
            names = self.names()
            raise NotFound(
                f"no {self.noun_name} {name_or_id!r}{did_you_mean(name_or_id, names)}",
                hint=f"known {self.noun_name}s: {', '.join(sorted(names)[:10]) or 'none yet'}",
            )
        return row

    def list(self) -> list[Noun]:
        """All rows, oldest first."""
        with reading(self.engine) as session:
            documents = session.scalars(select(self.record.document).order_by(self.record.id)).all()
        return [self.noun.model_validate_json(document) for document in documents]

    def page(self, limit: int, before: str | None = None, where: Mapping[str, str] | None = None) -> Sequence[Noun]:
        """At most `limit` rows, the newest first, older than the id `before`; `where` is fields of the noun and their values.

        Fields inside fields are written with dots: `spec.adapter`.
        """
        statement = select(self.record.document).order_by(self.record.id.desc()).limit(limit)
        if before is not None:
            statement = statement.where(self.record.id < before)
        for field, value in (where or {}).items():
            statement = statement.where(func.json_extract(self.record.document, f"$.{field}") == value)
        with reading(self.engine) as session:
            return [self.noun.model_validate_json(document) for document in session.scalars(statement)]

    def count(self) -> int:
        with reading(self.engine) as session:
            return session.scalar(select(func.count()).select_from(self.record)) or 0

    def names(self) -> set[str]:
        with reading(self.engine) as session:
            return set(session.scalars(select(self.record.name)))

    def replace(self, row: Noun) -> Noun:
        """Store the row's present state. Raises `NotFound` when it was removed, `Conflict` when another has its name."""
        identity: Any = row
        with transaction(self.engine) as session:
            if self.unique_names:
                same = select(self.record.id).where(self.record.name == identity.name, self.record.id != identity.id)
                taken = session.scalar(same)
                if taken is not None:
                    raise Conflict(f"there is already a {self.noun_name} named {identity.name!r}: {taken}")
            stored = session.get(self.record, identity.id)
            if stored is None:
                raise NotFound(f"{self.noun_name} {identity.id} has been removed")
            self.write(stored, row)
        return row

    def write(self, stored: Record, row: Noun) -> None:
        for column, value in self.columns(row).items():
            setattr(stored, column, value)

    def remove(self, row_id: str) -> None:
        with transaction(self.engine) as session:
            stored = session.get(self.record, row_id)
            if stored is not None:
                session.delete(stored)

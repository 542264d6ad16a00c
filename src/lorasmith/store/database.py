"""The SQLite database: facts only, one table per noun, a JSON document beside the columns that are searched."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry

from lorasmith.files import disk_full

DATABASE_NAME = "lorasmith.db"
HEAD_REVISION = "0001"


class Base(DeclarativeBase):
    pass


class Record(Base):
    """Columns that every noun has; `document` is the pydantic model as JSON."""

    __abstract__ = True

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    document: Mapped[str]


class DatasetRecord(Record):
    __tablename__ = "datasets"


class JobRecord(Record):
    __tablename__ = "jobs"


class AdapterRecord(Record):
    __tablename__ = "adapters"


class ModelRecord(Record):
    __tablename__ = "models"


class EvaluationRecord(Record):
    __tablename__ = "evaluations"


def open_database(home: Path) -> Engine:
    """Connect, in WAL mode, and bring the schema to the newest revision."""
    home.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{home / DATABASE_NAME}")
    event.listen(engine, "connect", set_pragmas)
    if current_revision(engine) != HEAD_REVISION:
        migrate(engine)
    return engine


def set_pragmas(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a committed row survives a power cut; 1.7 ms a commit
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()


def current_revision(engine: Engine) -> str | None:
    if not inspect(engine).has_table("alembic_version"):
        return None
    with engine.connect() as connection:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def migrate(engine: Engine) -> None:
    from alembic import command  # 0.2 s, and needed once per home
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """One transaction, whole or absent. Raises `DiskFull`."""
    try:
        with Session(engine) as session, session.begin():
            yield session
    except OperationalError as error:
        if getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
            raise
        raise disk_full(Path(engine.url.database or ".")) from error

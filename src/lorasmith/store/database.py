"""The SQLite database: facts only, one table per noun, a JSON document beside the columns that are searched."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, Float, Index, create_engine, event, inspect, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry

from lorasmith.errors import Busy, Conflict, DiskFull, LorasmithError
from lorasmith.files import disk_full, only_one_process
from lorasmith.store.database_file import DATABASE_NAME, back_up, backup_due, damaged, is_damage

MIGRATION_LOCK = "lorasmith.db.migration"
BUSY_TIMEOUT_MS = 10_000
HEAD_REVISION = "0002"
READ_ONLY = "lorasmith_reads"
UNUSABLE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM)
KEPT_FOLDERS = ("datasets/*/dataset.json", "adapters/*/manifest.json", "jobs/*/job.json")


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
    """`lease_*` say which process answers for the job, in seconds since the machine started."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_status", "status", "id"),)

    kind: Mapped[str]
    status: Mapped[str]
    priority: Mapped[int] = mapped_column(default=0)
    lane: Mapped[str] = mapped_column(default="cpu")
    cores: Mapped[int | None]
    lease_token: Mapped[int] = mapped_column(default=0)
    lease_holder: Mapped[str | None]
    lease_boot: Mapped[str | None]
    lease_until: Mapped[float] = mapped_column(Float, default=0.0)


class AdapterRecord(Record):
    __tablename__ = "adapters"


class ModelRecord(Record):
    __tablename__ = "models"


class EvaluationRecord(Record):
    __tablename__ = "evaluations"


def open_database(home: Path) -> Engine:
    """Connect, in WAL mode, and bring the schema to the newest revision. A copy is kept before that, and once a day.

    Raises `DamagedDatabase` for a file that is not a whole database, and where there is none beside the folders that it listed.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(home, error.strerror) from error
    engine = connect(home)
    with database_errors(engine):
        if current_revision(engine) != HEAD_REVISION or backup_due(home):
            with only_one_process(home / MIGRATION_LOCK):
                prepare(engine, home)
    return engine


def prepare(engine: Engine, home: Path) -> None:
    """What is due, if no other process has done it meanwhile."""
    revision = current_revision(engine)
    if revision is None and any(next(home.glob(kept), None) for kept in KEPT_FOLDERS):
        raise damaged(home / DATABASE_NAME, "it lists nothing, and there are folders that it listed")
    if revision is not None and (revision != HEAD_REVISION or backup_due(home)):
        try:
            back_up(home / DATABASE_NAME)
        except DiskFull:
            if revision != HEAD_REVISION:
                raise  # else the full disk may still be read; `lorasmith doctor` says how old the newest copy is
    if revision != HEAD_REVISION:
        migrate(engine)


def connect(home: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{home / DATABASE_NAME}", max_overflow=-1
    )  # a thread waits for the database, where it gets `Busy`, and never for a connection
    event.listen(engine, "connect", set_pragmas)
    event.listen(engine, "begin", begin)
    return engine


def set_pragmas(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a committed row survives a power cut; 1.7 ms a commit
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.close()
    connection.isolation_level = None  # `begin` below says BEGIN, not the driver


def begin(connection: Connection) -> None:
    """A writing transaction takes the write lock at once: one that reads first could not get it later."""
    reads = connection.get_execution_options().get(READ_ONLY)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def current_revision(engine: Engine) -> str | None:
    with engine.connect().execution_options(**{READ_ONLY: True}) as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def migrate(engine: Engine) -> None:
    """Bring the schema to `HEAD_REVISION`; raises `Conflict` for a database that a newer lorasmith has written."""
    from alembic import command  # 0.2 s, and needed once per home
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise Conflict(
                f"{engine.url.database} was written by a newer lorasmith: {error}", hint="pip install -U lorasmith"
            ) from error


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Read and write; one at a time in all processes. Raises `Busy` when another one holds the database too
    long, `DiskFull` and `DamagedDatabase`.
    """
    with database_errors(engine), Session(engine) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """Read one state of the database; neither waits for a writer nor makes it wait."""
    with database_errors(engine), Session(engine.execution_options(**{READ_ONLY: True})) as session:
        yield session


def unusable(home: Path, why: object) -> LorasmithError:
    return LorasmithError(
        f"the home folder {home} cannot be read and written: {why}",
        hint="make it writable, or choose another one with --home or LORASMITH_HOME",
    )


@contextmanager
def database_errors(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        if is_damage(error.orig):
            raise damaged(Path(engine.url.database or "."), error.orig) from error
        if not isinstance(error, OperationalError):
            raise
        code = getattr(error.orig, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_FULL:
            raise disk_full(Path(engine.url.database or ".")) from error
        kind = None if code is None else code & 0xFF  # the rest is its variant
        if kind in UNUSABLE:
            raise unusable(Path(engine.url.database or ".").parent, error.orig) from error
        if kind != sqlite3.SQLITE_BUSY:
            raise
        raise Busy(
            f"another process has held {engine.url.database} for {BUSY_TIMEOUT_MS / 1000:.0f} s",
            hint="try again; when it stays so, see which process has the file open",
        ) from error

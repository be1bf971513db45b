"""The database: one engine, and two kinds of unit of work, reading and writing.

There is one writer at a time, in SQLite because it knows no other way, in PostgreSQL because each writing unit begins by
locking the head row of the event log, which it needs anyway to append. So no two changes ever interleave, on either
database and with any number of gateway processes, and the number of an event is the order of commits. Volatile facts
(who trains now, when a site was last seen) are written by units that take no such lock and append no event.
"""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, DateTime, Dialect, Engine, MetaData, TypeDecorator, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Session

from medhive.errors import InvalidInput, NoSpace, Unavailable

BUSY_TIMEOUT_S = 30  # a writer waits this long for the others before it gives up; each takes milliseconds
# PostgreSQL ends a change whose gateway has not been heard of for so long, its machine cut off, say; else the lock that all
# writers need would be free only when TCP gives up, after two hours.
SILENT_S = 60
POOL_CONNECTIONS = 20
POOL_OVERFLOW = 24  # above the thread pool's forty, so that a thread never waits for a connection
WRITES = "medhive_writes"
DISK_FULL = ("disk is full", "no space left", "could not extend")  # as SQLite and PostgreSQL put it
# Times come back in UTC wherever the server stands; and a server that is away is noticed.
POSTGRES_ARGUMENTS = {"connect_timeout": 10, "options": "-c timezone=UTC"}
PATIENCE = text(
    "SELECT set_config('lock_timeout', :busy, true), set_config('idle_in_transaction_session_timeout', :silent, true)"
)

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Root of the tables."""

    metadata = MetaData(naming_convention=NAMING)


class UtcTime(TypeDecorator[datetime.datetime]):
    """A moment with a zone: kept in UTC, also in SQLite, which knows no zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime.datetime | None, dialect: Dialect) -> datetime.datetime | None:
        """Convert to UTC; what would fall off the calendar's edge by that stays at the edge."""
        if value is None:
            return None
        try:
            moment = value.astimezone(datetime.UTC)
        except OverflowError:
            edge = datetime.datetime.min if value.year == 1 else datetime.datetime.max
            moment = edge.replace(tzinfo=datetime.UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(
        self,
        value: datetime.datetime | None,
        dialect: Dialect,  # noqa: ARG002
    ) -> datetime.datetime | None:
        """Give the zone back."""
        if value is None:
            return None
        return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)


class Database:
    """The engine and the units of work."""

    def __init__(self, url: str) -> None:
        """Open lazily; `url` is SQLAlchemy's.

        Raises:
            InvalidInput: the URL cannot be read.
        """
        try:
            self.engine = _engine(url)
        except ValueError as error:
            raise InvalidInput("MEDHIVE_GATEWAY_DATABASE_URL cannot be read as a database address.") from error
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reading = self.engine.execution_options(**options, postgresql_readonly=True)
        self._writing = self.engine.execution_options(**{WRITES: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A snapshot; nothing that is changed in it is kept."""
        with translated(), Session(self._reading, autoflush=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """The only writer: commits when the block ends well, else leaves everything as it was."""
        with translated(), Session(self._writing, autoflush=True) as session, session.begin():
            session.connection()  # SQLite's BEGIN IMMEDIATE has the whole database
            if not self.is_sqlite:
                session.execute(PATIENCE, {"busy": f"{BUSY_TIMEOUT_S}s", "silent": f"{SILENT_S}s"})
                session.execute(text("SELECT number FROM event_head WHERE id = 1 FOR UPDATE"))
            yield session

    @contextmanager
    def touch(self) -> Iterator[Session]:
        """Write volatile facts: no event, no lock but those of the rows themselves."""
        with translated(), Session(self._writing, autoflush=True) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


@contextmanager
def translated() -> Iterator[None]:
    """Name what is wrong with the database in our own words.

    Raises:
        NoSpace: its disk is full.
        Unavailable: it does not answer, or is busy for too long.
    """
    try:
        yield
    except (OperationalError, PoolTimeout) as error:
        if any(word in str(error).lower() for word in DISK_FULL):
            raise NoSpace("The disk of the coordinator's database is full; an admin must make room.") from error
        raise Unavailable("The coordinator's database does not answer; try again in a minute.") from error


def _engine(url: str) -> Engine:
    arguments: dict[str, Any] = {"pool_size": POOL_CONNECTIONS, "max_overflow": POOL_OVERFLOW}
    if not url.startswith("sqlite"):
        return create_engine(url, **arguments, pool_pre_ping=True, connect_args=POSTGRES_ARGUMENTS)
    engine = create_engine(url, **arguments, connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own guess at when a transaction begins is switched off: `_begin_sqlite` says it.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at once: a snapshot that becomes a writer later may find itself out of date and fail.
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

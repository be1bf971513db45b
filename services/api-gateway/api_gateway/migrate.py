"""Bring a database to the shape that this version knows, once, however many gateways start at the same moment."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from api_gateway.db import WRITES, Database
from medhive.errors import IncompatibleVersion

LOCK_KEY = 0x6D65646869766500  # "medhive": the PostgreSQL advisory lock under which one gateway migrates


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, without an ini file."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    made.attributes["connection"] = connection
    return made


def upgrade(database: Database) -> None:
    """Apply the missing steps. On SQLite the state folder's lock or the transaction's own keeps others away.

    Raises:
        IncompatibleVersion: the database was made by a newer version.
    """
    with database.engine.execution_options(**{WRITES: True}).connect() as connection, connection.begin():
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
        _require_known(connection)
        command.upgrade(config(connection), "head")


def _require_known(connection: Connection) -> None:
    present = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}
    if present is not None and present not in known:
        raise IncompatibleVersion(
            f"The database has revision {present}, which this version does not know: upgrade the gateway, or restore "
            "the database that belongs to this version.",
            revision=present,
        )

"""Everything that a hospital's node must still know after a power cut, in one SQLite file.

Command line and node loop are separate processes that meet here, so each operation opens the file, does one transaction
and closes it: nothing is cached, nothing is shared between threads, and a process that is killed leaves either the old or
the new row. A reply is written here before it is sent; `synchronous=FULL` makes that mean what it says.
"""

import errno
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from medhive.consent import Consent
from medhive.errors import Conflict, NoSpace
from medhive.spec import RunSpec
from medhive.wire import Head, Manifest

BUSY_TIMEOUT_S = 30.0  # another process holds the file for milliseconds; half a minute means that something is broken
PROBE_BYTES = 64 * 1024  # twice what SQLite's shared memory takes, without which it opens nothing

# One script per schema version, applied in order; a script that was released is never edited.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE studies (
        study TEXT PRIMARY KEY, data_dir TEXT, class_map TEXT NOT NULL, groups_csv TEXT, weights_file TEXT
    );
    CREATE TABLE consents (
        run_id TEXT PRIMARY KEY, study TEXT NOT NULL, state TEXT NOT NULL, given_by TEXT NOT NULL,
        signed TEXT NOT NULL, spec TEXT NOT NULL, created_at TEXT NOT NULL
    );
    CREATE TABLE replies (
        run_id TEXT NOT NULL, type TEXT NOT NULL, round INTEGER NOT NULL, base_digest TEXT NOT NULL,
        payload BLOB NOT NULL, file TEXT, created_at TEXT NOT NULL,
        PRIMARY KEY (run_id, type, round, base_digest)
    );
    CREATE TABLE inbox (
        message_id TEXT PRIMARY KEY, message TEXT NOT NULL, payload BLOB NOT NULL, received_at TEXT NOT NULL
    );
    CREATE TABLE runs (
        run_id TEXT PRIMARY KEY, study TEXT NOT NULL, state TEXT NOT NULL, round INTEGER NOT NULL,
        rounds INTEGER NOT NULL, announced INTEGER NOT NULL, updated_at TEXT NOT NULL
    );
    CREATE TABLE versions (
        study TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, size_bytes INTEGER NOT NULL,
        file TEXT NOT NULL, manifest TEXT NOT NULL, offered TEXT NOT NULL, decision TEXT NOT NULL, reason TEXT NOT NULL,
        person TEXT NOT NULL, decided_at TEXT, evaluation TEXT, received_at TEXT NOT NULL,
        PRIMARY KEY (study, version)
    );
    CREATE TABLE champions (
        id INTEGER PRIMARY KEY AUTOINCREMENT, study TEXT NOT NULL, version INTEGER NOT NULL, person TEXT NOT NULL,
        reason TEXT NOT NULL, at TEXT NOT NULL
    );
    CREATE TABLE requests (
        request_id TEXT PRIMARY KEY, study TEXT NOT NULL, spec_hash TEXT NOT NULL, person TEXT NOT NULL,
        created_at TEXT NOT NULL
    );
    CREATE TABLE heads (
        number INTEGER PRIMARY KEY, hash TEXT NOT NULL, signed TEXT NOT NULL, countersigned INTEGER NOT NULL,
        seen_at TEXT NOT NULL
    );
    CREATE TABLE outbox (
        id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, path TEXT NOT NULL, body TEXT NOT NULL,
        created_at TEXT NOT NULL, refused TEXT
    );
    """,
    "ALTER TABLE versions ADD COLUMN asked INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE studies ADD COLUMN labels_csv TEXT",
)

ConsentRecord = Literal["sending", "granted", "declined", "withdrawn"]


@dataclass(frozen=True)
class StudySettings:
    """What the hospital sets for one study; nothing of it leaves the hospital."""

    study: str
    data_dir: Path | None = None
    class_map: Mapping[str, str] = field(default_factory=dict)
    groups_csv: Path | None = None
    weights_file: Path | None = None
    labels_csv: Path | None = None


@dataclass(frozen=True)
class GivenConsent:
    """An own answer to a run, with the specification that it was given for; `given_by` names person, policy or request."""

    run_id: str
    study: str
    state: str
    given_by: str
    signed: Consent
    spec: RunSpec
    created_at: datetime


@dataclass(frozen=True)
class Reply:
    """A finished answer, kept so that it can be sent again; `file` is the update that goes with it."""

    run_id: str
    type: str
    round: int
    base_digest: str
    payload: bytes
    file: Path | None


@dataclass(frozen=True)
class InboxItem:
    """A message that the fleet has handed over and that is not answered yet; `message` is the adapter's own form."""

    message_id: str
    message: dict[str, Any]
    payload: bytes


@dataclass(frozen=True)
class KnownRun:
    """What this site last heard about a run; `announced` once its end was told to the people here."""

    run_id: str
    study: str
    state: str
    round: int
    rounds: int
    announced: bool


@dataclass(frozen=True)
class KnownVersion:
    """A model version that lies in the models folder; `asked` once the coordinator has asked this site alone about it."""

    study: str
    version: int
    digest: str
    size_bytes: int
    file: Path
    manifest: Manifest
    offered: str
    decision: str
    reason: str
    person: str
    decided_at: datetime | None
    evaluation: dict[str, Any] | None
    received_at: datetime
    asked: bool = False


@dataclass(frozen=True)
class ChampionEntry:
    """One line of the history of the version in use."""

    study: str
    version: int
    person: str
    reason: str
    at: datetime


@dataclass(frozen=True)
class SeenHead:
    """A signed head of the coordinator's event log that this site has seen."""

    number: int
    hash: str
    signed: Head
    countersigned: bool
    seen_at: datetime


@dataclass(frozen=True)
class Statement:
    """Something signed that the coordinator shall hear, by the path that it is posted to."""

    kind: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class OutboxItem:
    """A signed statement that the coordinator has not received yet; `refused` is its answer when it will not take it."""

    id: int
    kind: str
    path: str
    body: dict[str, Any]
    created_at: datetime
    refused: str | None


class Store:
    """The hospital's database. Safe to use from several threads and processes at once."""

    def __init__(self, path: Path) -> None:
        """Open the file, create it (mode 0600) or bring an older one to this version's schema.

        Raises:
            Conflict: a newer MedHive wrote it.
        """
        self.path = path
        self.root = path.parent
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        self._migrate()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            yield connection
        except sqlite3.OperationalError as error:
            if "full" in str(error) or not self._has_room():
                raise NoSpace(f"The disk that holds {self.path.parent} is full; free some space.") from error
            raise
        finally:
            connection.close()

    def _has_room(self) -> bool:
        """On a full disk SQLite cannot even read, and calls that an I/O error; writing a little tells the two apart."""
        try:
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
        except OSError as error:
            return error.errno not in (errno.ENOSPC, errno.EDQUOT)
        return True

    def _inside(self, file: Path | None) -> str | None:
        """A file's name relative to the state folder, which may be moved as a whole."""
        return str(file.relative_to(self.root)) if file is not None else None

    def _migrate(self) -> None:
        with self._transaction() as db:
            db.execute("CREATE TABLE IF NOT EXISTS schema (version INTEGER NOT NULL)")
            row = db.execute("SELECT MAX(version) FROM schema").fetchone()
            version = row[0] or 0
            if version > len(MIGRATIONS):
                raise Conflict(
                    f"{self.path} was written by a newer MedHive (schema {version}, this one knows {len(MIGRATIONS)}); "
                    "upgrade this installation.",
                    schema=version,
                )
            for number in range(version, len(MIGRATIONS)):
                for statement in MIGRATIONS[number].split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO schema VALUES (?)", (number + 1,))

    # ---- facts ---------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """The JSON value kept under a name, or None."""
        with self._reading() as db:
            row = db.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchone()
        return json.loads(row["value"]) if row else None

    def set_fact(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name; None removes it."""
        with self._transaction() as db:
            if value is None:
                db.execute("DELETE FROM facts WHERE name=?", (name,))
            else:
                db.execute("REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def change_fact(self, name: str, change: Callable[[Any], Any], statement: Statement | None = None) -> int:
        """Replace the value under a name by what is made of it, with nobody else's change in between.

        Args:
            name: of the fact.
            change: gets the JSON value, or None.
            statement: queued for the coordinator with the change: both are kept, or neither.

        Returns:
            The statement's number in the outbox, 0 without one.
        """
        with self._transaction() as db:
            row = db.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchone()
            changed = change(json.loads(row["value"]) if row else None)
            db.execute("REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(changed)))
            return _queue(db, statement) if statement is not None else 0

    # ---- studies -------------------------------------------------------------------------------------------------

    def study(self, study: str) -> StudySettings:
        """The site's settings for a study; the defaults when it has set none."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM studies WHERE study=?", (study,)).fetchone()
        return _study_of(row) if row else StudySettings(study)

    def set_study(self, settings: StudySettings) -> None:
        """Keep the site's settings for a study."""
        values = (
            settings.study,
            _text(settings.data_dir),
            json.dumps(dict(settings.class_map)),
            _text(settings.groups_csv),
            _text(settings.weights_file),
            _text(settings.labels_csv),
        )
        with self._transaction() as db:
            db.execute("REPLACE INTO studies VALUES (?, ?, ?, ?, ?, ?)", values)

    # ---- consents ------------------------------------------------------------------------------------------------

    def consent(self, run_id: str) -> GivenConsent | None:
        """The own answer to a run, or None."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM consents WHERE run_id=?", (run_id,)).fetchone()
        return _consent_of(row) if row else None

    def consents(self) -> list[GivenConsent]:
        """All own answers, newest first."""
        with self._reading() as db:
            rows = db.execute("SELECT * FROM consents ORDER BY created_at DESC").fetchall()
        return [_consent_of(row) for row in rows]

    def keep_consent(
        self, signed: Consent, spec: RunSpec, state: ConsentRecord, given_by: str, statement: Statement
    ) -> int:
        """Keep an own answer, replacing an earlier one for the same run, and queue it for the coordinator: both or neither.

        Returns:
            Its number in the outbox.
        """
        body = signed.body
        values = (
            body.run_id,
            spec.study,
            state,
            given_by,
            signed.model_dump_json(),
            spec.model_dump_json(),
            _now(),
        )
        with self._transaction() as db:
            db.execute("REPLACE INTO consents VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            return _queue(db, statement)

    def withdraw_consent(self, run_id: str, statement: Statement) -> int:
        """Write down that a consent is withdrawn and queue the withdrawal for the coordinator: both or neither.

        Returns:
            Its number in the outbox.
        """
        with self._transaction() as db:
            db.execute("UPDATE consents SET state='withdrawn' WHERE run_id=?", (run_id,))
            return _queue(db, statement)

    def forget_consent(self, run_id: str) -> None:
        """Drop an answer that the coordinator refused to take."""
        with self._transaction() as db:
            db.execute("DELETE FROM consents WHERE run_id=?", (run_id,))

    def set_consent_state(self, run_id: str, state: ConsentRecord) -> None:
        """Say how far an own answer has come; a withdrawal is never taken back."""
        with self._transaction() as db:
            db.execute("UPDATE consents SET state=? WHERE run_id=? AND state!='withdrawn'", (state, run_id))

    # ---- replies and inbox ---------------------------------------------------------------------------------------

    def reply(self, run_id: str, kind: str, round_number: int, base_digest: str) -> Reply | None:
        """The kept answer to exactly this task, or None."""
        query = "SELECT * FROM replies WHERE run_id=? AND type=? AND round=? AND base_digest=?"
        with self._reading() as db:
            row = db.execute(query, (run_id, kind, round_number, base_digest)).fetchone()
        if row is None:
            return None
        file = self.root / row["file"] if row["file"] else None
        return Reply(row["run_id"], row["type"], row["round"], row["base_digest"], row["payload"], file)

    def keep_reply(self, reply: Reply) -> None:
        """Make an answer durable before it is sent.

        Raises:
            Conflict: there is one for this task already; it stands.
        """
        values = (
            reply.run_id,
            reply.type,
            reply.round,
            reply.base_digest,
            reply.payload,
            self._inside(reply.file),
            _now(),
        )
        with self._transaction() as db:
            try:
                db.execute("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            except sqlite3.IntegrityError as error:
                raise Conflict(f"{reply.run_id} has an answer for round {reply.round} already.") from error

    def forget_reply(self, run_id: str, kind: str, round_number: int, base_digest: str) -> None:
        """Drop the answer to a task, so that it is made again."""
        query = "DELETE FROM replies WHERE run_id=? AND type=? AND round=? AND base_digest=?"
        with self._transaction() as db:
            db.execute(query, (run_id, kind, round_number, base_digest))

    def highest_round(self, run_id: str, kind: str) -> int:
        """The highest round of a run that this site has answered; -1 when there is none."""
        query = "SELECT COALESCE(MAX(round), -1) FROM replies WHERE run_id=? AND type=?"
        with self._reading() as db:
            return int(db.execute(query, (run_id, kind)).fetchone()[0])

    def keep_inbound(self, item: InboxItem) -> None:
        """Remember a message until it is answered."""
        values = (item.message_id, json.dumps(item.message), item.payload, _now())
        with self._transaction() as db:
            db.execute("REPLACE INTO inbox VALUES (?, ?, ?, ?)", values)

    def forget_inbound(self, message_id: str) -> None:
        """A message is answered, or no longer wanted."""
        with self._transaction() as db:
            db.execute("DELETE FROM inbox WHERE message_id=?", (message_id,))

    def inbox(self) -> list[InboxItem]:
        """What is not answered yet, oldest first."""
        with self._reading() as db:
            rows = db.execute("SELECT * FROM inbox ORDER BY received_at").fetchall()
        return [InboxItem(row["message_id"], json.loads(row["message"]), row["payload"]) for row in rows]

    # ---- runs ----------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> KnownRun | None:
        """What is known of a run, or None."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM runs WHERE run_id=?", (run_id,)).fetchone()
        return _run_of(row) if row else None

    def runs(self) -> list[KnownRun]:
        """All known runs, newest first."""
        with self._reading() as db:
            rows = db.execute("SELECT * FROM runs ORDER BY updated_at DESC").fetchall()
        return [_run_of(row) for row in rows]

    def keep_run(self, run: KnownRun) -> None:
        """Remember a run's state."""
        values = (run.run_id, run.study, run.state, run.round, run.rounds, int(run.announced), _now())
        with self._transaction() as db:
            db.execute("REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    # ---- versions ------------------------------------------------------------------------------------------------

    def version(self, study: str, version: int) -> KnownVersion | None:
        """A version that lies here, or None."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM versions WHERE study=? AND version=?", (study, version)).fetchone()
        return _version_of(row, self.root) if row else None

    def versions(self, study: str | None = None) -> list[KnownVersion]:
        """The versions that lie here, newest first."""
        where, values = ("WHERE study=?", (study,)) if study else ("", ())
        with self._reading() as db:
            rows = db.execute(f"SELECT * FROM versions {where} ORDER BY study, version DESC", values).fetchall()  # noqa: S608
        return [_version_of(row, self.root) for row in rows]

    def keep_version(self, file: Path, manifest: Manifest, offered: str) -> None:
        """Remember a version whose file and manifest lie in the models folder; what is decided stays decided."""
        body = manifest.body
        values = (
            body.study,
            body.version,
            body.digest,
            body.size_bytes,
            str(file),
            manifest.model_dump_json(),
            offered,
        )
        query = (
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, 'pending', '', '', NULL, NULL, ?, 0) "
            "ON CONFLICT (study, version) DO UPDATE SET offered=excluded.offered, file=excluded.file"
        )
        with self._transaction() as db:
            db.execute(query, (*values, _now()))

    def reopen_decision(self, study: str, version: int) -> None:
        """The coordinator asks this site about a version, or asks again: a new decision is wanted."""
        query = (
            "UPDATE versions SET decision='pending', reason='', decided_at=NULL, asked=1 WHERE study=? AND version=?"
        )
        with self._transaction() as db:
            db.execute(query, (study, version))

    def keep_evaluation(self, study: str, version: int, evaluation: dict[str, Any]) -> None:
        """Keep what the held-out data said of a version."""
        query = "UPDATE versions SET evaluation=? WHERE study=? AND version=?"
        with self._transaction() as db:
            db.execute(query, (json.dumps(evaluation), study, version))

    def decide(self, study: str, version: int, decision: str, *, person: str, reason: str) -> None:
        """Record a decision; an accepted version becomes the one in use."""
        query = "UPDATE versions SET decision=?, reason=?, person=?, decided_at=? WHERE study=? AND version=?"
        with self._transaction() as db:
            db.execute(query, (decision, reason, person, _now(), study, version))
            if decision == "accepted":
                db.execute(
                    "INSERT INTO champions (study, version, person, reason, at) VALUES (?, ?, ?, ?, ?)",
                    (study, version, person, reason, _now()),
                )

    def use_version(self, study: str, version: int, *, person: str, reason: str) -> None:
        """Put an accepted version in use again."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO champions (study, version, person, reason, at) VALUES (?, ?, ?, ?, ?)",
                (study, version, person, reason, _now()),
            )

    def champion(self, study: str) -> int | None:
        """The number of the version in use, or None: the last one put in use that was not rejected since."""
        query = (
            "SELECT c.version FROM champions c JOIN versions v ON v.study=c.study AND v.version=c.version "
            "WHERE c.study=? AND v.decision!='rejected' ORDER BY c.id DESC LIMIT 1"
        )
        with self._reading() as db:
            row = db.execute(query, (study,)).fetchone()
        return int(row["version"]) if row else None

    def champions(self, study: str) -> list[ChampionEntry]:
        """Which versions were put in use, the last one first."""
        with self._reading() as db:
            rows = db.execute("SELECT * FROM champions WHERE study=? ORDER BY id DESC", (study,)).fetchall()
        return [
            ChampionEntry(row["study"], row["version"], row["person"], row["reason"], _time(row["at"])) for row in rows
        ]

    # ---- own requests --------------------------------------------------------------------------------------------

    def keep_request(self, request_id: str, study: str, spec_hash: str, person: str) -> None:
        """Remember what this site itself asked for, so that it may consent to exactly that."""
        with self._transaction() as db:
            db.execute("REPLACE INTO requests VALUES (?, ?, ?, ?, ?)", (request_id, study, spec_hash, person, _now()))

    def own_request(self, request_id: str) -> tuple[str, str] | None:
        """(spec hash, person) of an own request, or None when somebody else asked."""
        with self._reading() as db:
            row = db.execute("SELECT spec_hash, person FROM requests WHERE request_id=?", (request_id,)).fetchone()
        return (row["spec_hash"], row["person"]) if row else None

    # ---- event heads ---------------------------------------------------------------------------------------------

    def keep_head(self, head: Head, countersigned: bool = False) -> None:
        """Remember a head of the coordinator's log.

        Raises:
            Conflict: another head with the same number was seen before: the log was rewritten.
        """
        body = head.body
        with self._transaction() as db:
            row = db.execute("SELECT hash FROM heads WHERE number=?", (body.number,)).fetchone()
            if row is not None and row["hash"] != body.hash:
                raise Conflict(
                    f"The coordinator's event log was rewritten: row {body.number} had another hash before. Tell the "
                    "coordinator, and keep site.db.",
                    number=body.number,
                    before=row["hash"],
                    now=body.hash,
                )
            values = (body.number, body.hash, head.model_dump_json(), int(countersigned), _now())
            db.execute("REPLACE INTO heads VALUES (?, ?, ?, ?, ?)", values)

    def newest_head(self) -> SeenHead | None:
        """The head with the highest number, or None."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM heads ORDER BY number DESC LIMIT 1").fetchone()
        if row is None:
            return None
        signed = Head.model_validate_json(row["signed"])
        return SeenHead(row["number"], row["hash"], signed, bool(row["countersigned"]), _time(row["seen_at"]))

    # ---- outbox --------------------------------------------------------------------------------------------------

    def post(self, kind: str, path: str, body: dict[str, Any]) -> int:
        """Queue a statement for the coordinator; returns its number."""
        with self._transaction() as db:
            return _queue(db, Statement(kind, path, body))

    def outbox_item(self, item_id: int) -> OutboxItem | None:
        """A statement that the coordinator has not taken: it waits, or was refused."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM outbox WHERE id=?", (item_id,)).fetchone()
        return _outbox_of(row) if row else None

    def outbox(self) -> list[OutboxItem]:
        """What the coordinator has neither taken nor refused, oldest first."""
        with self._reading() as db:
            rows = db.execute("SELECT * FROM outbox WHERE refused IS NULL ORDER BY id").fetchall()
        return [_outbox_of(row) for row in rows]

    def delivered(self, item_id: int) -> None:
        """The coordinator has taken it."""
        with self._transaction() as db:
            db.execute("DELETE FROM outbox WHERE id=?", (item_id,))

    def refused(self, item_id: int, why: str) -> None:
        """The coordinator will not take it; kept for the people here."""
        with self._transaction() as db:
            db.execute("UPDATE outbox SET refused=? WHERE id=?", (why, item_id))


def _queue(db: sqlite3.Connection, statement: Statement) -> int:
    cursor = db.execute(
        "INSERT INTO outbox (kind, path, body, created_at) VALUES (?, ?, ?, ?)",
        (statement.kind, statement.path, json.dumps(statement.body), _now()),
    )
    return int(cursor.lastrowid or 0)


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _text(path: Path | None) -> str | None:
    return str(path) if path is not None else None


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _study_of(row: sqlite3.Row) -> StudySettings:
    return StudySettings(
        row["study"],
        _path(row["data_dir"]),
        json.loads(row["class_map"]),
        _path(row["groups_csv"]),
        _path(row["weights_file"]),
        _path(row["labels_csv"]),
    )


def _consent_of(row: sqlite3.Row) -> GivenConsent:
    return GivenConsent(
        run_id=row["run_id"],
        study=row["study"],
        state=row["state"],
        given_by=row["given_by"],
        signed=Consent.model_validate_json(row["signed"]),
        spec=RunSpec.model_validate_json(row["spec"]),
        created_at=_time(row["created_at"]),
    )


def _run_of(row: sqlite3.Row) -> KnownRun:
    return KnownRun(row["run_id"], row["study"], row["state"], row["round"], row["rounds"], bool(row["announced"]))


def _version_of(row: sqlite3.Row, root: Path) -> KnownVersion:
    return KnownVersion(
        study=row["study"],
        version=row["version"],
        digest=row["digest"],
        size_bytes=row["size_bytes"],
        file=root / row["file"],
        manifest=Manifest.model_validate_json(row["manifest"]),
        offered=row["offered"],
        decision=row["decision"],
        reason=row["reason"],
        person=row["person"],
        decided_at=_time(row["decided_at"]) if row["decided_at"] else None,
        evaluation=json.loads(row["evaluation"]) if row["evaluation"] else None,
        received_at=_time(row["received_at"]),
        asked=bool(row["asked"]),
    )


def _outbox_of(row: sqlite3.Row) -> OutboxItem:
    return OutboxItem(
        row["id"], row["kind"], row["path"], json.loads(row["body"]), _time(row["created_at"]), row["refused"]
    )

"""The tables. Names of people, sites and studies are their own keys, so that a row can be read without a join.

States are kept as the words of `medhive.states`; `transition` is the one way to change one, so that of two who try at the
same moment exactly one succeeds.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, ForeignKeyConstraint, Index, Integer, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from api_gateway.db import Base, UtcTime

# SQLite numbers rows by itself only in a column of exactly this type.
RowId = BigInteger().with_variant(Integer, "sqlite")
HEAD_ROW = 1
ZERO_HASH = "0" * 64
"""What the first event names as the hash of the row before it."""


class Account(Base):
    """A person's login."""

    __tablename__ = "accounts"
    username: Mapped[str] = mapped_column(Text, primary_key=True)
    role: Mapped[str] = mapped_column(Text)
    site: Mapped[str | None] = mapped_column(ForeignKey("sites.name"))
    password_hash: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    disabled: Mapped[bool] = mapped_column(default=False)


class Token(Base):
    """A bearer token, by its hash alone; of an account, or of a site's machine."""

    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    sha256: Mapped[str] = mapped_column(Text, unique=True)
    role: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    account: Mapped[str | None] = mapped_column(ForeignKey("accounts.username"), index=True)
    site: Mapped[str | None] = mapped_column(ForeignKey("sites.name"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    expires_at: Mapped[datetime] = mapped_column(UtcTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcTime)


class Attempt(Base):
    """How often somebody failed lately; volatile, bounded by its pruning."""

    __tablename__ = "attempts"
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    count: Mapped[int]
    window_ends_at: Mapped[datetime] = mapped_column(UtcTime)


class UsedNonce(Base):
    """A nonce that a site has used; kept until what it was used in would be too old anyway."""

    __tablename__ = "used_nonces"
    site: Mapped[str] = mapped_column(Text, primary_key=True)
    nonce: Mapped[str] = mapped_column(Text, primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(UtcTime)


class Site(Base):
    """A hospital, from its first invite on."""

    __tablename__ = "sites"
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    state: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    joined_at: Mapped[datetime | None] = mapped_column(UtcTime)
    last_seen_at: Mapped[datetime | None] = mapped_column(UtcTime)
    source_address: Mapped[str | None] = mapped_column(Text)
    software: Mapped[str | None] = mapped_column(Text)
    protocol: Mapped[int | None] = mapped_column()
    node_public_key: Mapped[str | None] = mapped_column(Text)
    consent_public_key: Mapped[str | None] = mapped_column(Text)
    consent_key_id: Mapped[str | None] = mapped_column(Text)
    node_id: Mapped[str | None] = mapped_column(Text)
    node_online: Mapped[bool] = mapped_column(default=False)
    evaluates_only: Mapped[bool] = mapped_column(default=False)


class Invite(Base):
    """One right to join, once, for a while; of its key only a hash of the public half."""

    __tablename__ = "invites"
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"))
    studies: Mapped[list[str]] = mapped_column(JSON)
    key_sha256: Mapped[str] = mapped_column("secret_sha256", Text, unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    expires_at: Mapped[datetime] = mapped_column(UtcTime)
    used_at: Mapped[datetime | None] = mapped_column(UtcTime)
    withdrawn_at: Mapped[datetime | None] = mapped_column(UtcTime)


class Study(Base):
    """A question with a task, data of one layout, members and defaults."""

    __tablename__ = "studies"
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    task: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    defaults: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcTime)


class Member(Base):
    """A site's part in a study."""

    __tablename__ = "members"
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), primary_key=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"), primary_key=True, index=True)
    added_at: Mapped[datetime] = mapped_column(UtcTime)


class TrainingRequest(Base):
    """Somebody's wish for one run; REQ_n."""

    __tablename__ = "requests"
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), index=True)
    requested_by: Mapped[str] = mapped_column(Text)
    site: Mapped[str | None] = mapped_column(ForeignKey("sites.name"))
    state: Mapped[str] = mapped_column(Text, index=True)
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    spec_hash: Mapped[str] = mapped_column(Text)
    note: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    source_address: Mapped[str | None] = mapped_column(Text)
    decided_by: Mapped[str | None] = mapped_column(Text)
    decided_at: Mapped[datetime | None] = mapped_column(UtcTime)
    reason: Mapped[str] = mapped_column(Text, default="")


class Run(Base):
    """One execution of a specification; RUN_n. `fence` counts the holders of its lease."""

    __tablename__ = "runs"
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    request_id: Mapped[int] = mapped_column(ForeignKey("requests.id"), unique=True)
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), index=True)
    state: Mapped[str] = mapped_column(Text, index=True)
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    spec_hash: Mapped[str] = mapped_column(Text)
    round: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    consent_deadline: Mapped[datetime] = mapped_column(UtcTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcTime)
    reason: Mapped[str] = mapped_column(Text, default="")
    stop_requested: Mapped[bool] = mapped_column(default=False)
    version: Mapped[int | None]
    mlflow_run_id: Mapped[str | None] = mapped_column(Text)
    updated_at: Mapped[datetime] = mapped_column(UtcTime, index=True)
    holder: Mapped[str | None] = mapped_column(Text)
    fence: Mapped[int] = mapped_column(default=0)
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcTime)
    end_report: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class ConsentRow(Base):
    """One member site's standing in one run, with the newest document that it signed."""

    __tablename__ = "consents"
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"), primary_key=True, index=True)
    state: Mapped[str] = mapped_column(Text)
    document: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    answered_at: Mapped[datetime | None] = mapped_column(UtcTime)


class ConsentDocument(Base):
    """Every document that a site ever signed about a run; a nonce counts once."""

    __tablename__ = "consent_documents"
    __table_args__ = (UniqueConstraint("site", "nonce"),)
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), index=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"))
    nonce: Mapped[str] = mapped_column(Text)
    document: Mapped[dict[str, Any]] = mapped_column(JSON)
    received_at: Mapped[datetime] = mapped_column(UtcTime)


class Round(Base):
    """One round of a run; `report` is the aggregator's, without its fence."""

    __tablename__ = "rounds"
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(Text)
    opened_at: Mapped[datetime] = mapped_column(UtcTime)
    bytes_down: Mapped[int] = mapped_column(BigInteger)
    bytes_up: Mapped[int] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any]] = mapped_column(JSON)


class ActivityRow(Base):
    """What a site does about a run right now; volatile."""

    __tablename__ = "activity"
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"), primary_key=True)
    report: Mapped[dict[str, Any]] = mapped_column(JSON)
    round: Mapped[int]
    started_at: Mapped[datetime | None] = mapped_column(UtcTime)
    updated_at: Mapped[datetime] = mapped_column(UtcTime)


class Blob(Base):
    """Complete bytes in the blob store, by their SHA-256."""

    __tablename__ = "blobs"
    digest: Mapped[str] = mapped_column(Text, primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcTime)


class BlobReference(Base):
    """Why a blob is kept, and so who may read it: one run or one version needs it."""

    __tablename__ = "blob_references"
    __table_args__ = (
        UniqueConstraint("digest", "run_id", "owner"),
        UniqueConstraint("study", "version"),
        ForeignKeyConstraint(["study", "version"], ["versions.study", "versions.number"]),
        Index("ix_blob_references_run_id_owner", "run_id", "owner"),
    )
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    digest: Mapped[str] = mapped_column(ForeignKey("blobs.digest"), index=True)
    run_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id"))
    # Who uploaded it: a site's name; empty for the aggregator, whose blobs are the run's global weights; `@` and a site's
    # name for what the aggregator made for that site alone.
    owner: Mapped[str] = mapped_column(Text)
    study: Mapped[str | None] = mapped_column(Text)
    version: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(UtcTime)


class Version(Base):
    """A model version; `bytes_kept` turns false when a clean-up has removed its weights."""

    __tablename__ = "versions"
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    layout_digest: Mapped[str] = mapped_column(Text)
    run_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id"))
    rounds: Mapped[int]
    metrics: Mapped[dict[str, float]] = mapped_column(JSON)
    confusion: Mapped[list[list[int]]] = mapped_column(JSON)
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    bytes_kept: Mapped[bool] = mapped_column(default=True)


class DecisionRow(Base):
    """What one site says of one version, with the document that it signed."""

    __tablename__ = "decisions"
    __table_args__ = (ForeignKeyConstraint(["study", "version"], ["versions.study", "versions.number"]),)
    study: Mapped[str] = mapped_column(Text, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"), primary_key=True)
    state: Mapped[str] = mapped_column(Text)
    document: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    decided_at: Mapped[datetime | None] = mapped_column(UtcTime)
    issued_at: Mapped[datetime | None] = mapped_column(UtcTime)


class EventHead(Base):
    """The one row whose lock serialises every change: number and hash of the newest event."""

    __tablename__ = "event_head"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[str] = mapped_column(Text)


class Event(Base):
    """One row of the log. `data` is text, so that the bytes under the hash never change."""

    __tablename__ = "events"
    number: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(UtcTime)
    kind: Mapped[str] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(Text)
    subject: Mapped[str] = mapped_column(Text)
    study: Mapped[str | None] = mapped_column(Text, index=True)
    run_id: Mapped[str | None] = mapped_column(Text)
    site: Mapped[str | None] = mapped_column(Text, index=True)
    data: Mapped[str] = mapped_column(Text)
    previous: Mapped[str] = mapped_column(Text)
    hash: Mapped[str] = mapped_column(Text)


class CountersignatureRow(Base):
    """A site's signature under a head; `agrees` is false when it has seen another hash than this log holds."""

    __tablename__ = "countersignatures"
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    agrees: Mapped[bool]
    document: Mapped[dict[str, Any]] = mapped_column(JSON)
    received_at: Mapped[datetime] = mapped_column(UtcTime)


class Queue(Base):
    """A study's contribution queue; QUEUE_n. At most one of a study is open."""

    __tablename__ = "queues"
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    study: Mapped[str] = mapped_column(ForeignKey("studies.name"), index=True)
    open: Mapped[bool]
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    spec_hash: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcTime)


class QueueConsent(Base):
    """Every statement that a site signed about a queue; its newest one counts, a nonce counts once."""

    __tablename__ = "queue_consents"
    __table_args__ = (UniqueConstraint("site", "nonce"),)
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    queue_id: Mapped[int] = mapped_column(ForeignKey("queues.id"), index=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"), index=True)
    nonce: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    document: Mapped[dict[str, Any]] = mapped_column(JSON)
    received_at: Mapped[datetime] = mapped_column(UtcTime)


class Execution(Base):
    """One average of a queue. `fence` counts the holders of its lease; `result_digest` is an average that was sent."""

    __tablename__ = "executions"
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    queue_id: Mapped[int] = mapped_column(ForeignKey("queues.id"), index=True)
    state: Mapped[str] = mapped_column(Text, index=True)
    asked_by: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcTime)
    reason: Mapped[str] = mapped_column(Text, default="")
    version: Mapped[int | None]
    result_digest: Mapped[str | None] = mapped_column(Text)
    end_report: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    holder: Mapped[str | None] = mapped_column(Text)
    fence: Mapped[int] = mapped_column(default=0)
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcTime)


class ContributionRow(Base):
    """One contribution to a queue, with the manifest that its site signed and, once it is averaged, its lineage."""

    __tablename__ = "contributions"
    __table_args__ = (UniqueConstraint("queue_id", "site", "digest"),)
    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    queue_id: Mapped[int] = mapped_column(ForeignKey("queues.id"))
    consent_id: Mapped[int] = mapped_column(ForeignKey("queue_consents.id"), index=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.name"), index=True)
    state: Mapped[str] = mapped_column(Text, index=True)
    digest: Mapped[str] = mapped_column(Text, index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    base_version: Mapped[int]
    examples: Mapped[int] = mapped_column(BigInteger)
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON)
    source_address: Mapped[str] = mapped_column(Text)
    received_at: Mapped[datetime] = mapped_column(UtcTime)
    execution_id: Mapped[int | None] = mapped_column(ForeignKey("executions.id"), index=True)
    staleness: Mapped[int | None]
    weight: Mapped[float | None]
    version: Mapped[int | None]
    reason: Mapped[str] = mapped_column(Text, default="")

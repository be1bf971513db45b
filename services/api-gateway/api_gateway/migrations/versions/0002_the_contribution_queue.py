"""The contribution queue."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "queues",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("study", sa.Text(), nullable=False),
        sa.Column("open", sa.Boolean(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("spec_hash", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.name"], name=op.f("fk_queues_study_studies")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_queues")),
    )
    with op.batch_alter_table("queues", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_queues_study"), ["study"], unique=False)

    op.create_table(
        "executions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("queue_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("asked_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("result_digest", sa.Text(), nullable=True),
        sa.Column("end_report", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("holder", sa.Text(), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["queue_id"], ["queues.id"], name=op.f("fk_executions_queue_id_queues")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_executions")),
    )
    with op.batch_alter_table("executions", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_executions_queue_id"), ["queue_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_executions_state"), ["state"], unique=False)

    op.create_table(
        "queue_consents",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("queue_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("nonce", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["queue_id"], ["queues.id"], name=op.f("fk_queue_consents_queue_id_queues")),
        sa.ForeignKeyConstraint(["site"], ["sites.name"], name=op.f("fk_queue_consents_site_sites")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_queue_consents")),
        sa.UniqueConstraint("site", "nonce", name=op.f("uq_queue_consents_site_nonce")),
    )
    with op.batch_alter_table("queue_consents", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_queue_consents_queue_id"), ["queue_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_queue_consents_site"), ["site"], unique=False)

    op.create_table(
        "contributions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("queue_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("consent_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_version", sa.Integer(), nullable=False),
        sa.Column("examples", sa.BigInteger(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("source_address", sa.Text(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("execution_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("staleness", sa.Integer(), nullable=True),
        sa.Column("weight", sa.Double(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["consent_id"], ["queue_consents.id"], name=op.f("fk_contributions_consent_id_queue_consents")
        ),
        sa.ForeignKeyConstraint(
            ["execution_id"], ["executions.id"], name=op.f("fk_contributions_execution_id_executions")
        ),
        sa.ForeignKeyConstraint(["queue_id"], ["queues.id"], name=op.f("fk_contributions_queue_id_queues")),
        sa.ForeignKeyConstraint(["site"], ["sites.name"], name=op.f("fk_contributions_site_sites")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_contributions")),
        sa.UniqueConstraint("queue_id", "site", "digest", name=op.f("uq_contributions_queue_id_site_digest")),
    )
    with op.batch_alter_table("contributions", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_contributions_consent_id"), ["consent_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_contributions_digest"), ["digest"], unique=False)
        batch_op.create_index(batch_op.f("ix_contributions_execution_id"), ["execution_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_contributions_site"), ["site"], unique=False)
        batch_op.create_index(batch_op.f("ix_contributions_state"), ["state"], unique=False)


def downgrade() -> None:
    """Undo."""
    with op.batch_alter_table("contributions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_contributions_state"))
        batch_op.drop_index(batch_op.f("ix_contributions_site"))
        batch_op.drop_index(batch_op.f("ix_contributions_execution_id"))
        batch_op.drop_index(batch_op.f("ix_contributions_digest"))
        batch_op.drop_index(batch_op.f("ix_contributions_consent_id"))

    op.drop_table("contributions")
    with op.batch_alter_table("queue_consents", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_queue_consents_site"))
        batch_op.drop_index(batch_op.f("ix_queue_consents_queue_id"))

    op.drop_table("queue_consents")
    with op.batch_alter_table("executions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_executions_state"))
        batch_op.drop_index(batch_op.f("ix_executions_queue_id"))

    op.drop_table("executions")
    with op.batch_alter_table("queues", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_queues_study"))

    op.drop_table("queues")

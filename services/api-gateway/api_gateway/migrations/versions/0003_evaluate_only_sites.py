"""Sites that only evaluate."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply; every site that is there trains."""
    with op.batch_alter_table("sites", schema=None) as batch_op:
        batch_op.add_column(sa.Column("evaluates_only", sa.Boolean(), nullable=False, server_default=sa.false()))

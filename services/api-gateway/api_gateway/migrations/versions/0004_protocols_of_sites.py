"""Which protocol each site speaks."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply; who has joined spoke the first protocol when it was heard last."""
    with op.batch_alter_table("sites", schema=None) as batch_op:
        batch_op.add_column(sa.Column("protocol", sa.Integer(), nullable=True))
    op.execute("UPDATE sites SET protocol = 1 WHERE joined_at IS NOT NULL")

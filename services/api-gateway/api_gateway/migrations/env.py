"""What alembic runs; the connection comes from `api_gateway.migrate`, which holds the lock."""

from alembic import context

from api_gateway import models
from api_gateway.db import Base

assert models.HEAD_ROW  # noqa: S101  (the tables are known once their module is imported)

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()

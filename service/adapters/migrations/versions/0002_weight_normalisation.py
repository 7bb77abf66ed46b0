"""Keep a model's weight normalisation; from here on a prediction's logits may be float32."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; rows of logits beyond float16's range stay as lowered as they were stored."""
    with op.batch_alter_table("model_versions") as table:
        table.add_column(sa.Column("weight_normalisation", sa.Text))


def downgrade() -> None:
    """Drop the column; rows of float32 logits would not be understood, so there must be none."""
    with op.batch_alter_table("model_versions") as table:
        table.drop_column("weight_normalisation")

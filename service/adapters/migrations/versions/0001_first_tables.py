"""Make the first tables: model versions, priors, predictions, labels and their history."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables and their indices."""
    op.create_table(
        "model_versions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("class_counts", sa.LargeBinary, nullable=False),
        sa.Column("source_prior", sa.LargeBinary, nullable=False),
        sa.Column("logit_offset", sa.LargeBinary, nullable=False),
        sa.Column("temperature", sa.Float, nullable=False),
        sa.Column("tau", sa.Float),
        sa.Column("groups", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("loaded", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("name", "version", name="uq_model_versions_name_version"),
    )
    op.create_table(
        "priors",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("label_set", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("probabilities", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("note", sa.Text),
        sa.Column("author", sa.Text),
        sa.Column("deleted", sa.BigInteger),
        sa.UniqueConstraint("label_set", "name", "version", name="uq_priors_label_set_name_version"),
    )
    op.create_table(
        "predictions",
        sa.Column("id", sa.LargeBinary(16), primary_key=True),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("model_version_id", sa.Integer, sa.ForeignKey("model_versions.id"), nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("tau", sa.Float, nullable=False),
        sa.Column("temperature", sa.Float, nullable=False),
        sa.Column("prior_name", sa.Text),
        sa.Column("prior_version", sa.Integer),
        sa.Column("decided", sa.Integer, nullable=False),
        sa.Column("top", sa.LargeBinary, nullable=False),
        sa.Column("unadjusted", sa.LargeBinary, nullable=False),
        sa.Column("logits", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_predictions_window", "predictions", ["model_version_id", "created", "id", "decided"])
    op.create_table(
        "labels",
        sa.Column("prediction_id", sa.LargeBinary(16), sa.ForeignKey("predictions.id"), primary_key=True),
        sa.Column("model_version_id", sa.Integer, sa.ForeignKey("model_versions.id"), nullable=False),
        sa.Column("predicted_at", sa.BigInteger, nullable=False),
        sa.Column("label", sa.Integer, nullable=False),
        sa.Column("sampling_probability", sa.Float),
        sa.Column("labelled_at", sa.BigInteger),
    )
    op.create_index("ix_labels_window", "labels", ["model_version_id", "predicted_at", "prediction_id"])
    op.create_table(
        "label_history",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("prediction_id", sa.LargeBinary(16), sa.ForeignKey("predictions.id"), nullable=False),
        sa.Column("label", sa.Integer, nullable=False),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.Column("labelled_at", sa.BigInteger),
    )
    op.create_index("ix_label_history_prediction", "label_history", ["prediction_id"])
    op.create_table(
        "probes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("written", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("probes", "label_history", "labels", "predictions", "priors", "model_versions"):
        op.drop_table(table)

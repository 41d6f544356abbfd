"""The tables, as SQLAlchemy knows them. `migrations/` brings a database to exactly this; a test holds the two together.

Times are seconds since 1970 as floats. JSON columns hold objects and lists that are only ever read whole. Large bytes
have tables of their own, so that listing ten thousand chunks does not read their pictures.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("served_at", Double, nullable=False),  # when a job of this tenant was last begun: whose turn it is
)

recordings = Table(
    "recordings",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("source_kind", String(16), nullable=False),
    Column("url", Text),
    Column("file_id", String(128)),
    Column("secret", Text),
    Column("policy", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("captured_at", Double),
    Column("duration_s", Double),
    Column("ingested_s", Double, nullable=False),
    Column("frames_sampled", BigInteger, nullable=False),
    Column("frames_encoded", BigInteger, nullable=False),
    Column("frames_static", BigInteger, nullable=False),
    Column("frames_reused", BigInteger, nullable=False),
    Column("frames_dropped", BigInteger, nullable=False),
    Column("frames_corrupt", BigInteger, nullable=False),
    Column("chunks", BigInteger, nullable=False),
    Column("bytes_cold", BigInteger, nullable=False),
    Column("reconnects", BigInteger, nullable=False),
    Column("error_code", String(64), nullable=False),
    Column("error", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("metadata", JSON, nullable=False),
    Index(None, "tenant", "created_at", "id"),
)

segments = Table(
    "segments",
    metadata,
    Column("recording_id", String(36), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("path", Text, nullable=False),
    Column("start_s", Double, nullable=False),
    Column("duration_s", Double, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("source_number", BigInteger),
    Column("source_until", Double),
    ForeignKeyConstraint(["recording_id"], ["recordings.id"]),
    Index(None, "recording_id", "start_s"),
)

chunks = Table(
    "chunks",
    metadata,
    Column("recording_id", String(36), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("start_s", Double, nullable=False),
    Column("end_s", Double, nullable=False),
    Column("body", Text, nullable=False),  # groups and gaps, as `store.pack_chunk` writes them
    ForeignKeyConstraint(["recording_id"], ["recordings.id"]),
    Index(None, "recording_id", "start_s", "end_s"),
)

chunk_vectors = Table(
    "chunk_vectors",
    metadata,
    Column("recording_id", String(36), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("vector", LargeBinary, nullable=False),
    ForeignKeyConstraint(["recording_id", "number"], ["chunks.recording_id", "chunks.number"]),
)

chunk_thumbnails = Table(
    "chunk_thumbnails",
    metadata,
    Column("recording_id", String(36), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("thumbnail", LargeBinary, nullable=False),
    ForeignKeyConstraint(["recording_id", "number"], ["chunks.recording_id", "chunks.number"]),
)

token_uses = Table(
    "token_uses",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("recording_id", String(36), primary_key=True),
    ForeignKeyConstraint(["recording_id"], ["recordings.id"]),
    Index(None, "recording_id"),
)
"""Which recordings stand on which token records, so that deleting one leaves what another needs."""

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("recording_id", String(36)),
    Column("params", JSON, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("idempotency_key", String(256)),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("worker", String(128), nullable=False),
    Column("lease_until", Double, nullable=False),  # of a queued job: until when it is put off
    Column("created_at", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("finished_at", Double),
    Column("progress", JSON, nullable=False),
    Column("result", JSON(none_as_null=True)),
    Column("error_code", String(64), nullable=False),
    Column("error", Text, nullable=False),
    Column("cancel_asked", Boolean, nullable=False),
    Column("last_event", Integer, nullable=False),
    UniqueConstraint("tenant", "idempotency_key"),
    Index(None, "state", "kind", "not_before"),
    Index(None, "state", "lease_until"),
    Index(None, "tenant", "created_at", "id"),
    Index(None, "recording_id"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", String(36), primary_key=True),
    Column("step", String(256), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
    ForeignKeyConstraint(["job_id"], ["jobs.id"]),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(36), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(32), nullable=False),
    Column("data", JSON, nullable=False),
    Column("at", Double, nullable=False),
    ForeignKeyConstraint(["job_id"], ["jobs.id"]),
)

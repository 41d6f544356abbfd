"""How the tables came to be, step by step (Alembic). `Database.migrate` runs what a database has not had yet."""

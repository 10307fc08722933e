"""MLflow's local database: made whole or not at all, by one process."""

from __future__ import annotations

import os
from pathlib import Path

from infra.files import file_lock, sync
from infra.mlflow_uri import artifact_location, local_database


def make_database(uri: str) -> None:
    """Make the local database at an address if it is missing; a server's address is left alone.

    It is made beside its place, and renamed: MLflow makes its tables in some seconds, refuses for
    ever a database in which it was stopped on the way, and fails where two processes do it at once.
    """
    path = local_database(uri)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_name(f"{path.name}.lock"), lambda: None):
        if not path.exists():
            _make(path, artifact_location(uri))


def _make(path: Path, artifacts: str | None) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    SqlAlchemyStore(f"sqlite:///{temporary}", artifacts).engine.dispose()
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)

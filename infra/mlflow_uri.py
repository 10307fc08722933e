"""The address of MLflow, and what it says about where things lie."""

from __future__ import annotations

import os
from pathlib import Path

from mlflow import MlflowClient

from infra.files import file_lock, sync

_SQLITE = "sqlite:///"


def open_client(uri: str) -> MlflowClient:
    """A client of the server or database at an address, for tracking and registry alike.

    A local database is made by one process, beside its place, and renamed: MLflow makes its tables
    in some seconds, refuses for ever a database in which it was stopped on the way, and fails where
    two processes do it at once.
    """
    path = _database(uri)
    if path is not None and not path.exists():
        with file_lock(path.with_name(f"{path.name}.lock"), lambda: None):
            if not path.exists():
                _make_database(path)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def artifact_location(uri: str) -> str | None:
    """Beside a local database, in `artifacts`; None lets a server use its own place.

    Without it MLflow would write `mlruns` in whatever folder the program was started in.
    """
    path = _database(uri)
    return None if path is None else (path.parent / "artifacts").as_uri()


def _database(uri: str) -> Path | None:
    """The file of a local database."""
    return Path(uri.removeprefix(_SQLITE)).absolute() if uri.startswith(_SQLITE) else None


def _make_database(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    uri = f"{_SQLITE}{temporary}"
    SqlAlchemyStore(uri, artifact_location(f"{_SQLITE}{path}")).engine.dispose()
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)

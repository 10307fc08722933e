"""What an MLflow address says about where its artifacts lie, and what of it may be shown."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

_SQLITE = "sqlite:///"


def artifact_location(uri: str) -> str | None:
    """Beside a local database, in `artifacts`; None lets a server use its own place.

    Without it MLflow would write `mlruns` in whatever folder the program was started in.
    """
    path = local_database(uri)
    return None if path is None else (path.parent / "artifacts").as_uri()


def local_database(uri: str) -> Path | None:
    """The file of a local database, or None."""
    return Path(uri.removeprefix(_SQLITE)).absolute() if uri.startswith(_SQLITE) else None


def is_server(uri: str) -> bool:
    """Whether it is asked over HTTP."""
    return uri.startswith(("http://", "https://"))


def is_local(uri: str) -> bool:
    """Whether it is a file of this machine, which is never away."""
    return uri.startswith(_SQLITE)


def without_password(uri: str) -> str:
    """The address without the name and password that it may hold."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

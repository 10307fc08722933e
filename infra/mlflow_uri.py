"""What an MLflow address says about where its artifacts lie."""

from __future__ import annotations

from pathlib import Path

_SQLITE = "sqlite:///"


def artifact_location(uri: str) -> str | None:
    """Beside a local database, in `artifacts`; None lets a server use its own place.

    Without it MLflow would write `mlruns` in whatever folder the program was started in.
    """
    if not uri.startswith(_SQLITE):
        return None
    return (Path(uri.removeprefix(_SQLITE)).absolute().parent / "artifacts").as_uri()

"""The error of a tracking server that is away; importing it does not cost importing MLflow."""

from __future__ import annotations


class TrackingUnavailable(ConnectionError):
    """The tracking server does not answer."""

    waited: float = 0.0
    """Seconds that it was waited for before this was raised; 0 where nobody waits."""

"""Whether an MLflow server is there, and how long anybody waits for it."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from infra.mlflow_database import make_database
from infra.mlflow_uri import is_server, without_password
from infra.unavailable import TrackingUnavailable

_PING_SECONDS = 5.0
"""How long a server may take to say that it is there; one that hangs costs no more than this."""
_FRESH_SECONDS = 2.0
"""An answer is good for so long: calls in a row ask once."""
_SETTLE_SECONDS = 2.0
"""A server that comes back first does what had been asked before; then one looks what is there."""
_FIRST_PAUSE_SECONDS = 0.5
_LAST_PAUSE_SECONDS = 30.0
_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""Error codes of a server, or of what stands before it, that may be gone in a while."""


def is_away(error: BaseException) -> bool:
    """Whether an error says that the server is away, and not that a request was wrong."""
    if isinstance(error, MlflowException):
        return error.error_code in _AWAY
    return isinstance(error, OSError)


def ping(uri: str) -> None:
    """Raise `TrackingUnavailable` unless something answers there, within seconds.

    Asked before each piece of work: a request that is never sent cannot be done twice by a server
    that hangs and comes back. A local database is always there.
    """
    if not is_server(uri):
        return
    try:
        http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=0,
            timeout=_PING_SECONDS,
            retry_codes=(502, 503, 504),
        )
    except MlflowException as error:
        raise unavailable(uri, error) from error


def unavailable(uri: str, error: object) -> TrackingUnavailable:
    """The error that names the server and the remedy."""
    place = without_password(uri)
    why = _why(error).replace(uri, place)
    return TrackingUnavailable(
        f"MLflow at {place} does not answer ({why}); start it, "
        "or set MLFLOW_TRACKING_URI to another address (unset: a database in the home)"
    )


def settle() -> None:
    """Let a server that was away do what it was asked before."""
    time.sleep(_SETTLE_SECONDS)


def pauses() -> Iterator[float]:
    """Seconds between tries: exponential with jitter, up to half a minute."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        yield pause * random.uniform(0.8, 1.2)
        pause = min(2 * pause, _LAST_PAUSE_SECONDS)


class ReachingClient:
    """An `MlflowClient` that asks whether the server is there first, and waits for it so long.

    A call that creates something is sent once only: whether the server has done it before it went
    away cannot be known, so the caller looks again.
    """

    def __init__(self, uri: str, patience: float, on_wait: Callable[[str], None]) -> None:
        self._uri = uri
        self._patience = patience
        self._on_wait = on_wait
        self._answered = -_FRESH_SECONDS

    @functools.cached_property
    def _client(self) -> MlflowClient:
        make_database(self._uri)
        # A database is opened here: that fails, too, where it is away.
        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._call, name)

    def _call(self, name: str, /, *arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + self._patience
        tries = pauses()
        waited = False
        while True:
            sent = False
            try:
                self._ask()
                if waited:
                    settle()
                sent = True
                return self._sent(name, *arguments, **options)
            except Exception as error:
                if not (isinstance(error, TrackingUnavailable) or is_away(error)):
                    raise
                self._answered = -_FRESH_SECONDS
                if sent and name.startswith("create_"):
                    raise unavailable(self._uri, error) from error
                if time.monotonic() >= deadline:
                    raise self._gave_up(error) from error
                if not waited:
                    self._on_wait(f"{unavailable(self._uri, error)}; waiting for it")
                waited = True
            time.sleep(min(next(tries), max(0.0, deadline - time.monotonic())))

    def _sent(self, name: str, /, *arguments: Any, **options: Any) -> Any:
        result = getattr(self._client, name)(*arguments, **options)
        self._answered = time.monotonic()
        return result

    def _ask(self) -> None:
        if time.monotonic() - self._answered >= _FRESH_SECONDS:
            ping(self._uri)
            self._answered = time.monotonic()

    def _gave_up(self, error: Exception) -> TrackingUnavailable:
        found = error if isinstance(error, TrackingUnavailable) else unavailable(self._uri, error)
        found.waited = self._patience
        return found


def reaching_client(uri: str, patience: float, on_wait: Callable[[str], None]) -> MlflowClient:
    """The client for people and for runs; typed as what it stands for."""
    return cast(MlflowClient, ReachingClient(uri, patience, on_wait))


def _why(error: object) -> str:
    """One clause: the HTTP library's own text is four errors inside each other."""
    text = str(error).strip() or type(error).__name__
    if "timed out" in text or "timeout" in text:
        return "it takes too long"
    if "Connection refused" in text:
        return "connection refused"
    return text.splitlines()[0][:300]

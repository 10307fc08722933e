from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from infra import mlflow_reach
from infra.mlflow_reach import ReachingClient, is_away, ping
from infra.mlflow_tracking import Tracking
from infra.mlflow_uri import without_password
from infra.registry import Registry
from infra.unavailable import TrackingUnavailable

pytestmark = pytest.mark.slow


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def dead() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_never_answers_costs_one_short_time_out(
    black_hole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the question before, MLflow would wait for its own time-out, and for each call."""
    monkeypatch.setattr(mlflow_reach, "_PING_SECONDS", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    started = time.monotonic()
    with pytest.raises(TrackingUnavailable, match="MLFLOW_TRACKING_URI") as caught:
        Tracking(black_hole).open_pipeline_run("demo", "night", {"posttrain.run": "r1"})
    assert time.monotonic() - started < 60
    assert "secret" not in str(caught.value)


def test_a_dead_server_is_named(dead: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingUnavailable, match=f"{dead} .*connection refused") as caught:
        Registry(dead, tmp_path).champion("policy")
    assert caught.value.waited == 0


def test_somebody_who_says_no_is_there(httpserver_404: str) -> None:
    ping(httpserver_404)


@pytest.fixture
def httpserver_404() -> Iterator[str]:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # 501 for every method
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (MlflowException("API request failed"), True),
        (MlflowException("x", error_code=1), True),  # INTERNAL_ERROR
        (MlflowException("x", error_code=1000), False),  # INVALID_PARAMETER_VALUE
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (TypeError(), False),
    ],
)
def test_what_counts_as_away(error: Exception, away: bool) -> None:
    assert is_away(error) is away


class Scripted:
    """A client that fails as its script says, and then works."""

    def __init__(self, *script: Exception) -> None:
        self.script = list(script)
        self.calls = 0

    def get_run(self) -> str:
        self.calls += 1
        if self.script:
            raise self.script.pop(0)
        return "here"

    create_run = get_run


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(mlflow_reach, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(mlflow_reach, "_LAST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(mlflow_reach, "_SETTLE_SECONDS", 0.0)
    return []


def client(scripted: Scripted, patience: float, waits: list[str]) -> Any:
    made = ReachingClient("sqlite:///nowhere.db", patience, waits.append)
    made.__dict__["_client"] = scripted
    return made


def test_a_server_that_comes_back_in_time_is_waited_for(waits: list[str]) -> None:
    scripted = Scripted(*(MlflowException("refused") for _ in range(3)))
    assert client(scripted, 20.0, waits).get_run() == "here"
    assert scripted.calls == 4
    (said,) = waits  # once for one outage
    assert said.endswith("waiting for it")


def test_the_wait_is_bounded(waits: list[str]) -> None:
    scripted = Scripted(*(MlflowException("refused") for _ in range(1000)))
    with pytest.raises(TrackingUnavailable, match="refused") as caught:
        client(scripted, 0.1, waits).get_run()
    assert caught.value.waited == 0.1


def test_what_creates_is_sent_once(waits: list[str]) -> None:
    scripted = Scripted(MlflowException("timed out"))
    with pytest.raises(TrackingUnavailable) as caught:
        client(scripted, 20.0, waits).create_run()
    assert scripted.calls == 1
    assert caught.value.waited == 0  # the whole may be tried again, which looks first


def test_a_wrong_request_is_not_an_outage(waits: list[str]) -> None:
    scripted = Scripted(MlflowException("no such run", error_code=1001))
    with pytest.raises(MlflowException, match="no such run"):
        client(scripted, 20.0, waits).get_run()
    assert waits == []


def test_addresses_are_shown_without_the_password() -> None:
    assert without_password("postgresql://a:b@host:5432/x") == "postgresql://host:5432/x"
    assert without_password("sqlite:////home/x@y/mlflow.db") == "sqlite:////home/x@y/mlflow.db"
    assert without_password("https://host/x") == "https://host/x"

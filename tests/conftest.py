"""Servers that the tests of a process share, since each costs seconds; and the order of files."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.servers import MlflowServer, PrefectServer

_LONG = ("test_end_to_end.py", "test_worker.py", "test_mlflow_outage.py")


def pytest_configure() -> None:
    """Undo what a shell does to jobs in the background: SIGINT ignored, in all that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take a minute each go first: no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server; a test that kills it starts it again."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"))
    yield server
    server.process.end()


@pytest.fixture(scope="session")
def real_prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real Prefect server; a test that kills it starts it again."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect-server"))
    yield server
    server.process.end()


@pytest.fixture(autouse=True)
def prefect_that_answers(request: pytest.FixtureRequest) -> None:
    """No test waits for a server that an earlier one has left without life."""
    if "real_prefect" in request.fixturenames:
        request.getfixturevalue("real_prefect").revive()

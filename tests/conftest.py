"""Servers that the tests of a process share, since each costs seconds; and the order of files."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.servers import MlflowServer, Postgres, PrefectServer, postgres_programs

_DATABASE = "POSTTRAIN_TEST_PREFECT_DATABASE"
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
    """A real Prefect server; a test that kills it starts it again.

    On PostgreSQL where that is installed: on SQLite it may stand still for a minute. `make
    test-servers` has SQLite all the same.
    """
    with ExitStack() as stack:
        database = None
        if postgres_programs() is not None and os.environ.get(_DATABASE) != "sqlite":
            postgres = Postgres(tmp_path_factory.mktemp("prefect-database"))
            stack.callback(postgres.end)
            database = postgres.url("asyncpg", "prefect")
        server = PrefectServer(tmp_path_factory.mktemp("prefect-server"), database)
        stack.callback(server.process.end)
        yield server


@pytest.fixture(autouse=True)
def prefect_that_answers(request: pytest.FixtureRequest) -> None:
    """No test waits for a server that an earlier one has left without life."""
    if "real_prefect" in request.fixturenames:
        request.getfixturevalue("real_prefect").revive()

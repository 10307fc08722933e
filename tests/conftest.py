"""Servers that all tests share: each costs seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import MlflowServer, PrefectServer


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

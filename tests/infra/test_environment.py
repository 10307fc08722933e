from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.environment import Home, quiet_environment
from infra.mlflow_uri import artifact_location
from schemas.base import UserError


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTTRAIN_HOME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_flag_then_variable_then_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Home.resolve(None).root == tmp_path / ".posttrain"
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "variable"))
    assert Home.resolve(None).root == tmp_path / "variable"
    assert Home.resolve("flag").root == tmp_path / "flag"
    home = Home.resolve("flag")
    assert home.store is home.store
    assert home.store.root == tmp_path / "flag" / "store"


def test_a_home_below_a_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/home cannot be written to .*--home"):
        Home.resolve(str(tmp_path / "file" / "home"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_home_is_the_users_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to"):
        Home.resolve(str(tmp_path / "home"))


def test_a_read_only_file_system_is_the_users_error() -> None:
    with pytest.raises(UserError, match="/proc/home cannot be written to"):
        Home.resolve("/proc/home")


def test_a_question_mark_cannot_stand_in_the_database_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rename it"):
        Home.resolve(str(tmp_path / "what?"))


def test_tracking_is_in_the_home_unless_a_server_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home.resolve(str(tmp_path / "a ü"))
    assert home.mlflow_uri == f"sqlite:///{tmp_path}/a ü/mlflow/mlflow.db"
    location = artifact_location(home.mlflow_uri)
    assert location == (tmp_path / "a ü" / "mlflow" / "artifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert home.mlflow_uri == "http://tracking:5000"
    assert artifact_location(home.mlflow_uri) is None


@pytest.mark.slow
def test_prefect_takes_every_setting_that_we_give_it(tmp_path: Path) -> None:
    home = Home.resolve(str(tmp_path / "Haus ü"))
    script = (
        "from prefect.settings import get_current_settings as get;"
        "s = get(); print(s.home); print(s.results.local_storage_path);"
        "print(s.server.ephemeral.startup_timeout_seconds); print(s.server.analytics_enabled);"
        "print(s.logging.to_api.when_missing_flow); print(s.server.memo_store_path)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    output = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, **quiet_environment(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    prefect = home.prefect_home
    expected = [prefect, prefect / "results", 120, False, "ignore", prefect / "memo_store.toml"]
    assert output.stdout.splitlines() == [str(value) for value in expected]

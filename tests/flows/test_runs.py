from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import load_recipe
from flows.runs import Runs, StageRow, config_digest
from schemas.base import UserError


def test_where_it_runs_does_not_make_another_run() -> None:
    plain = load_recipe("quickstart")
    elsewhere = load_recipe("quickstart", ["compute.num_threads=1", "data.root=/x"])
    assert config_digest(plain) == config_digest(elsewhere)
    assert config_digest(plain) != config_digest(load_recipe("quickstart", ["seed=1"]))


def test_a_finished_run_is_left_and_a_failed_one_is_opened_again(tmp_path: Path) -> None:
    runs, config = Runs(tmp_path), load_recipe("quickstart")
    with runs.open(config) as first:
        first.update(status="failed", outcome="broke", mlflow_run_id="m")
    with runs.open(load_recipe("quickstart", ["seed=1"])) as other:
        other.update(status="finished")
    with runs.open(config) as again:
        assert again.reopened
        assert again.record.run == first.record.run
        assert (again.record.status, again.record.outcome) == ("running", None)
        assert again.record.mlflow_run_id == "m"
        again.update(status="finished")
    with runs.open(config) as third:
        assert not third.reopened
        assert third.record.run != first.record.run
        third.update(status="finished")
    latest = runs.latest_finished(config_digest(config))
    assert latest is not None
    assert latest.run == third.record.run


def test_a_run_that_is_alive_is_left_to_its_process(tmp_path: Path) -> None:
    runs, config = Runs(tmp_path), load_recipe("quickstart")
    with runs.open(config) as first, runs.open(config) as second:
        assert first.record.run != second.record.run
        assert [record.status for record in runs.all()] == ["running", "running"]


def _hold(root: Path, ready: Any) -> None:
    with Runs(root).open(load_recipe("quickstart")):
        ready.set()
        signal.pause()


def test_a_killed_run_is_stopped_and_is_opened_again(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    runs = Runs(tmp_path)
    (alive,) = runs.all()
    assert alive.status == "running"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (dead,) = runs.all()
    assert dead.status == "stopped"
    with runs.open(load_recipe("quickstart")) as again:
        assert again.record.run == alive.run


def test_rows_are_replaced_by_name(tmp_path: Path) -> None:
    row = StageRow(
        name="train_sft",
        status="ran",
        seconds=1.0,
        peak_memory_bytes=1,
        fingerprint="f",
        artifact="artifacts/f/content",
    )
    with Runs(tmp_path).open(load_recipe("quickstart")) as run:
        run.write(run.record.with_row(row))
        run.write(run.record.with_row(row.model_copy(update={"status": "resumed"})))
    (record,) = Runs(tmp_path).all()
    assert [item.status for item in record.stages] == ["resumed"]


def test_the_nearest_run_is_offered(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    with pytest.raises(UserError, match="nothing has run there yet"):
        runs.read("latest")
    with runs.open(load_recipe("quickstart")) as run:
        run.update(status="finished")
    assert runs.read("latest").run == run.record.run
    with pytest.raises(UserError, match=f"did you mean {run.record.run}"):
        runs.read(run.record.run[:-1])


def test_a_record_of_another_version_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"run": "old"}')
    assert Runs(tmp_path).all() == []

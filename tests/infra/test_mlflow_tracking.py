from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

import pytest

from infra.environment import Home
from infra.mlflow_tracking import Tracking, metric_name
from infra.tracking import MetricsLine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tracking(home: Home) -> Tracking:
    return Tracking(home.mlflow_uri)


@pytest.fixture
def run_id(tracking: Tracking, request: pytest.FixtureRequest) -> str:
    name = request.node.name
    return tracking.open_pipeline_run("demo", name, {"posttrain.run": name})


def tags(tracking: Tracking, run_id: str) -> dict[str, str]:
    found: dict[str, str] = tracking.client.get_run(run_id).data.tags
    return found


def test_a_pipeline_run_is_opened_again_and_not_doubled(tracking: Tracking) -> None:
    first = tracking.open_pipeline_run("demo", "night", {"posttrain.run": "r1", "recipe": "demo"})
    tracking.finish_run(first, "FAILED")
    again = tracking.open_pipeline_run("demo", "night", {"posttrain.run": "r1", "try": "2"})
    assert again == first
    run = tracking.client.get_run(first)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "night"
    assert (run.data.tags["recipe"], run.data.tags["try"]) == ("demo", "2")
    assert tracking.open_pipeline_run("demo", "night", {"posttrain.run": "r2"}) != first
    assert tracking.open_pipeline_run("other", "night", {"posttrain.run": "r1"}) != first


def test_a_stage_run_is_nested_and_opened_again(tracking: Tracking, run_id: str) -> None:
    first = tracking.open_stage_run(run_id, "train_sft", "f1", {"optimizer": {"lr": 0.1}})
    again = tracking.open_stage_run(run_id, "train_sft", "f1", {"optimizer": {"lr": 0.1}})
    other = tracking.open_stage_run(run_id, "train_rl", "f2", {})
    assert first == again != other
    assert tags(tracking, first)["mlflow.parentRunId"] == run_id
    assert tags(tracking, first)["posttrain.stage"] == "train_sft"
    assert tracking.client.get_run(first).data.params == {"optimizer.lr": "0.1"}


def test_the_same_stage_of_another_pipeline_run_is_another_run(
    tracking: Tracking, run_id: str
) -> None:
    sibling = tracking.open_pipeline_run("demo", "sibling", {"posttrain.run": "sibling"})
    first = tracking.open_stage_run(run_id, "train_sft", "f1", {})
    assert tracking.open_stage_run(sibling, "train_sft", "f1", {}) != first


def test_parameters_many_long_or_changed_do_no_harm(tracking: Tracking, run_id: str) -> None:
    params: dict[str, Any] = {f"p{i}": i for i in range(250)}
    tracking.log_params(run_id, {**params, "long": "x" * 10_000, "none": None, "a@b": 1})
    tracking.log_params(run_id, {"p0": "changed", "new": 1})
    known = tracking.client.get_run(run_id).data.params
    assert len(known) == 254
    assert known["p0"] == "0"
    assert len(known["long"]) == 6000


def history(tracking: Tracking, run_id: str, key: str) -> list[tuple[int, float]]:
    found = tracking.client.get_metric_history(run_id, key)
    return [(metric.step, metric.value) for metric in found]


def test_the_same_name_on_two_machines_is_two_runs(tracking: Tracking) -> None:
    tags = [{"posttrain.run": "same", "posttrain.identity": uuid.uuid4().hex} for _ in range(2)]
    first, second = (tracking.open_pipeline_run("demo", "same", own) for own in tags)
    assert first != second
    assert tracking.open_pipeline_run("demo", "same", tags[0]) == first


def test_times_are_those_of_the_run_and_not_of_its_delivery(tracking: Tracking) -> None:
    run_id = tracking.open_pipeline_run("demo", "past", {"posttrain.run": "past"}, 1000.5)
    tracking.finish_run(run_id, "FAILED", 2000.25)
    info = tracking.client.get_run(run_id).info
    assert (info.start_time, info.end_time, info.status) == (1_000_500, 2_000_250, "FAILED")


def test_lines_that_are_sent_twice_arrive_once(tracking: Tracking, run_id: str) -> None:
    lines = [MetricsLine(step, {"pass@1": step / 8, "bad|name": 1.0}, 99.0) for step in (1, 2)]
    tracking.log_lines(run_id, lines)
    tracking.log_lines(run_id, [*lines, MetricsLine(3, {"pass@1": 0.5}, 99.0)])
    assert history(tracking, run_id, "pass_at_1") == [(1, 0.125), (2, 0.25), (3, 0.5)]
    assert history(tracking, run_id, "bad_name") == [(1, 1.0), (2, 1.0)]


def test_wide_lines_and_values_that_are_not_finite(tracking: Tracking, run_id: str) -> None:
    wide = {f"m{i}": float(i) for i in range(1500)}
    tracking.log_lines(run_id, [MetricsLine(1, {**wide, "nan": math.nan}, 1.0)])
    assert history(tracking, run_id, "m1499") == [(1, 1499.0)]
    ((_, value),) = history(tracking, run_id, "nan")
    assert math.isnan(value)


def test_doubles_of_one_request_are_dropped(tracking: Tracking, run_id: str) -> None:
    """A server that hung may do what it was asked for the first time after the second time."""
    stage = tracking.open_stage_run(run_id, "train_sft", "f1", {})
    info = tracking.client.get_run(stage).info
    own = {"mlflow.parentRunId": run_id, "posttrain.fingerprint": "f1"}
    double = tracking.client.create_run(info.experiment_id, tags=own).info.run_id
    other = tracking.open_stage_run(run_id, "train_rl", "f2", {})
    assert tracking.drop_doubles(stage) == 1
    assert tracking.client.get_run(double).info.lifecycle_stage == "deleted"
    for kept in (stage, other, run_id):
        assert tracking.client.get_run(kept).info.lifecycle_stage == "active"
    assert tracking.drop_doubles(stage) == 0


def test_a_file_is_kept_with_its_run(tracking: Tracking, run_id: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for text in ('{"read": 1}', '{"read": 2}'):
        path.write_text(text)
        tracking.log_file(run_id, path)
    assert [file.path for file in tracking.client.list_artifacts(run_id)] == ["report.json"]
    kept = tracking.client.download_artifacts(run_id, "report.json", str(tmp_path))
    assert Path(kept).read_text() == '{"read": 2}'


def test_names_stay_apart() -> None:
    assert [metric_name(key) for key in ("pass@1", "a/b c-d.e:f", "ü")] == [
        "pass_at_1",
        "a/b c-d.e:f",
        "_",
    ]

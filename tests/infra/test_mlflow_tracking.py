from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import mlflow_tracking
from infra.environment import Home
from infra.mlflow_tracking import (
    MetricsShipper,
    Tracking,
    TrackingUnavailable,
    metric_name,
    ship_pending,
)
from infra.tracking import FileTracker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tracking(home: Home) -> Tracking:
    return Tracking(home.mlflow_uri)


@pytest.fixture
def run_id(tracking: Tracking, request: pytest.FixtureRequest) -> str:
    name = request.node.name
    return tracking.open_pipeline_run("demo", name, {"posttrain.run": name})


class Shipping:
    """A metrics file, its cursor, and a run that they are shipped to."""

    def __init__(self, tracking: Tracking, run_id: str, folder: Path) -> None:
        self.tracking = tracking
        self.run_id = run_id
        self.metrics = folder / "metrics.jsonl"
        self.cursor = folder / "cursor.json"
        self.tracker = FileTracker(self.metrics)

    def log(self, *steps: int, **more: float) -> None:
        for step in steps:
            self.tracker.log_metrics({"loss": float(step), **more}, step)

    def ship(self) -> int:
        return ship_pending(self.tracking, self.run_id, self.metrics, self.cursor)

    def shipper(self) -> MetricsShipper:
        return MetricsShipper(self.tracking, self.run_id, self.metrics, self.cursor)

    def arrived(self, key: str = "loss") -> list[int]:
        history = self.tracking.client.get_metric_history(self.run_id, key)
        return [metric.step for metric in history]


@pytest.fixture
def shipping(tracking: Tracking, run_id: str, tmp_path: Path) -> Shipping:
    return Shipping(tracking, run_id, tmp_path)


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


def test_metrics_at_once(tracking: Tracking, run_id: str) -> None:
    tracking.log_metrics(run_id, {"pass@1": 0.5, "bad|name": 1.0, "nan": math.nan}, step=3)
    found = tracking.client.get_run(run_id).data.metrics
    assert found["pass_at_1"] == 0.5
    assert found["bad_name"] == 1.0


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


def test_metrics_are_shipped_in_order_and_once(shipping: Shipping) -> None:
    shipping.log(1, 2, 3)
    assert shipping.ship() == 3
    assert shipping.ship() == 0
    shipping.log(4)
    assert shipping.ship() == 1
    assert shipping.arrived() == [1, 2, 3, 4]


def test_nothing_to_ship_is_no_error(shipping: Shipping) -> None:
    assert shipping.ship() == 0
    assert not shipping.cursor.exists()


def test_a_line_that_is_being_written_waits(shipping: Shipping) -> None:
    shipping.log(1)
    whole = shipping.metrics.read_text()
    with shipping.metrics.open("a") as file:
        file.write(whole.replace('"step": 1', '"step": 2')[:-5])
    assert shipping.ship() == 1
    with shipping.metrics.open("a") as file:
        file.write(whole[-5:])
    assert shipping.ship() == 1
    assert shipping.arrived() == [1, 2]


@pytest.mark.parametrize("checkpoint", [0, 2, 4])
@pytest.mark.parametrize("seen_between", [True, False])
def test_steps_that_are_run_again_after_a_resume_are_not_doubled(
    shipping: Shipping, checkpoint: int, seen_between: bool
) -> None:
    shipping.log(1, 2, 3, 4)
    shipping.ship()
    resumed = FileTracker(shipping.metrics)
    resumed.rewind(checkpoint)
    if seen_between:
        assert shipping.ship() == 0
    shipping.log(*range(checkpoint + 1, 8), eval=1.0)
    shipping.ship()
    assert shipping.arrived() == [1, 2, 3, 4, 5, 6, 7]
    assert shipping.arrived("eval") == list(range(checkpoint + 1, 8))


def test_a_kill_between_sending_and_noting_it_does_not_double(
    shipping: Shipping, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipping.log(1, 2)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_tracking, "write_atomic", kill)
        with pytest.raises(KeyboardInterrupt):
            shipping.ship()
    assert shipping.arrived() == [1, 2]
    shipping.log(3)
    shipping.ship()
    assert shipping.arrived() == [1, 2, 3]


def test_many_lines_and_wide_lines_go_in_batches(shipping: Shipping) -> None:
    shipping.log(*range(120))
    shipping.tracker.log_metrics({f"m{i}": 1.0 for i in range(1500)}, 120)
    assert shipping.ship() == 120 + 1500
    assert shipping.arrived() == list(range(120))
    assert shipping.arrived("m1499") == [120]


def test_values_that_are_not_finite_arrive(shipping: Shipping) -> None:
    shipping.tracker.log_metrics({"nan": math.nan, "inf": math.inf}, 1)
    assert shipping.ship() == 2
    (nan,) = shipping.tracking.client.get_metric_history(shipping.run_id, "nan")
    assert math.isnan(nan.value)


def outage(shipping: Shipping, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Cuts the connection; the returned function mends it."""
    alive = threading.Event()
    real = shipping.tracking.client.log_batch

    def log_batch(*arguments: Any, **options: Any) -> Any:
        if not alive.is_set():
            raise ConnectionError("nobody there")
        return real(*arguments, **options)

    monkeypatch.setattr(shipping.tracking.client, "log_batch", log_batch)
    monkeypatch.setattr(mlflow_tracking, "_POLL_SECONDS", 0.02)
    return alive.set


def await_steps(shipping: Shipping, steps: list[int]) -> None:
    deadline = time.monotonic() + 20
    while shipping.arrived() != steps:
        assert time.monotonic() < deadline, shipping.arrived()
        time.sleep(0.05)


def test_the_shipper_survives_an_outage(
    shipping: Shipping, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mend = outage(shipping, monkeypatch)
    with caplog.at_level(logging.WARNING), shipping.shipper() as shipper:
        shipping.log(1, 2)
        time.sleep(0.3)
        assert shipping.arrived() == []
        mend()
        shipping.log(3)
        await_steps(shipping, [1, 2, 3])
        shipping.log(4)
    assert shipper.close()
    assert shipping.arrived() == [1, 2, 3, 4]
    assert caplog.text.count("nobody there") == 1  # one line for one outage


def test_what_the_server_missed_goes_with_a_later_run(
    shipping: Shipping, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mend = outage(shipping, monkeypatch)
    shipper = shipping.shipper()
    shipper.start()
    shipping.log(1, 2)
    with caplog.at_level(logging.WARNING):
        assert not shipper.close(drain_timeout=5)
    assert "metrics wait in" in caplog.text
    mend()
    assert shipping.ship() == 2
    assert shipping.arrived() == [1, 2]


def test_closing_does_not_wait_for_a_server_that_hangs(
    shipping: Shipping, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(shipping.tracking.client, "log_batch", lambda *_, **__: release.wait(20))
    shipping.log(1)
    shipper = shipping.shipper()
    shipper.start()
    started = time.monotonic()
    assert not shipper.close(drain_timeout=0.3)
    assert time.monotonic() - started < 3
    release.set()


def test_a_server_that_is_away_at_the_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = Tracking("http://127.0.0.1:9")
    with pytest.raises(TrackingUnavailable, match=r"127\.0\.0\.1:9 .*MLFLOW_TRACKING_URI"):
        tracking.open_pipeline_run("demo", "night", {"posttrain.run": "r1"})


def test_an_error_that_is_not_an_outage_keeps_its_name(tracking: Tracking) -> None:
    with pytest.raises(Exception, match="not found") as caught:
        tracking.open_stage_run("0" * 32, "train_sft", "f1", {})
    assert not isinstance(caught.value, TrackingUnavailable)

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from infra.tracking import FileTracker, parse_line, read_metrics


def steps(path: Path) -> list[int]:
    return [line.step for line in read_metrics(path)]


def test_every_call_is_one_line_that_is_on_disk_at_once(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path / "work" / "metrics.jsonl")
    tracker.log_metrics({"loss": 2.5, "lr": 1}, step=1)
    record = json.loads(tracker.path.read_text())
    assert record["step"] == 1
    assert record["metrics"] == {"loss": 2.5, "lr": 1.0}
    assert record["time"] > 1.7e9


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_nan_and_infinity_survive_as_valid_json(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path / "metrics.jsonl")
    tracker.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=0)
    strict = json.loads(tracker.path.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert strict["metrics"] == {"a": "nan", "b": "inf", "c": "-inf"}
    (line,) = read_metrics(tracker.path)
    assert math.isnan(line.metrics["a"])
    assert (line.metrics["b"], line.metrics["c"]) == (math.inf, -math.inf)


def test_a_torn_last_line_is_ignored_and_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    FileTracker(path).log_metrics({"loss": 1.0}, step=1)
    with path.open("a") as file:
        file.write('{"step": 2, "metr')
    assert steps(path) == [1]
    FileTracker(path).log_metrics({"loss": 0.5}, step=2)
    assert steps(path) == [1, 2]


def test_rewind_forgets_later_steps_and_keeps_the_rest(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        tracker.log_metrics({"loss": math.nan if step == 2 else float(step)}, step)
    before = tracker.path.read_bytes().splitlines()
    assert tracker.resumed_from_step is None
    tracker.rewind(4)  # within one attempt: nothing was resumed
    assert tracker.resumed_from_step is None
    tracker.resume(3)
    assert tracker.resumed_from_step == 3
    assert tracker.path.read_bytes().splitlines() == before[:3]
    tracker.rewind(3)
    tracker.log_metrics({"loss": 4.0}, 4)
    assert steps(tracker.path) == [1, 2, 3, 4]


def test_rewind_to_before_the_first_step_empties(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path / "metrics.jsonl")
    tracker.rewind(0)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.rewind(0)
    assert steps(tracker.path) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 1, "metrics": 3, "time": 0}', "x"])
def test_other_lines_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own error among them
        parse_line(text)


def test_what_the_stages_process_imports_is_light() -> None:
    script = (
        "import sys, infra.store, infra.tracking, infra.launch, infra.code, infra.environment;"
        "print(sorted({'torch', 'mlflow', 'prefect', 'numpy'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert output.stdout == "[]\n"


def test_a_damaged_line_does_not_keep_a_stage_from_going_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = FileTracker(path)
    for step in (1, 2, 3):
        tracker.log_metrics({"loss": float(step)}, step)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\xff" + lines[1][1:], lines[2], b""]))
    FileTracker(path).rewind(3)
    assert [line.step for line in read_metrics(path)] == [1, 3]
    assert "line 2 is damaged" in caplog.text

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from infra.outbox import Delivered, Lines, Outbox, Tags
from infra.tracking import MetricsLine, format_line


def line(step: int, **metrics: float) -> str:
    return format_line(MetricsLine(step, metrics, 1.0)).strip()


def contents(outbox: Outbox, offset: int = 0) -> list[Tags | Lines]:
    return [operation for operation, _ in outbox.read(offset)]


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "runs" / "Lauf mit Ümläuten" / "outbox")


def test_operations_come_back_in_order_and_from_any_place(outbox: Outbox) -> None:
    said = [Tags(run="pipeline", tags={"n": str(number)}) for number in range(5)]
    outbox.append(said[0])
    outbox.append(*said[1:])
    assert contents(outbox) == said
    offsets = [offset for _, offset in outbox.read(0)]
    assert offsets[-1] == outbox.size()
    assert contents(outbox, offsets[1]) == said[2:]
    assert contents(Outbox(outbox.folder)) == said


def test_an_operation_that_a_kill_has_cut_is_dropped_and_not_glued(outbox: Outbox) -> None:
    outbox.append(Tags(run="a", tags={"x": "1"}))
    with outbox.path.open("ab") as file:
        file.write(b'{"op":"tags","run":"a","ta')
    assert len(contents(outbox)) == 1
    again = Outbox(outbox.folder)
    again.append(Tags(run="a", tags={"x": "2"}))
    assert [one.tags["x"] for one in contents(again) if isinstance(one, Tags)] == ["1", "2"]


def test_a_full_disk_leaves_no_half(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.append(Tags(run="a", tags={"x": "1"}))
    before = outbox.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("infra.outbox.os.fsync", full)
        with pytest.raises(OSError, match="the disk is full"):
            outbox.append(Tags(run="a", tags={"x": "2"}))
    assert outbox.path.read_bytes() == before


@pytest.mark.parametrize("reopened", [True, False])
def test_steps_that_a_resumed_stage_writes_again_go_once(outbox: Outbox, reopened: bool) -> None:
    assert outbox.append_lines("f", [line(1, loss=1), line(2, loss=2), line(3, loss=3)]) == 3
    assert outbox.append_lines("other", [line(1, loss=1)]) == 1
    after = Outbox(outbox.folder) if reopened else outbox
    # From step 1 on again, now with a second metric at step 3.
    assert after.append_lines("f", [line(2, loss=2), line(3, loss=3, eval=9), line(4, loss=4)]) == 2
    told = [
        (record["step"], record["metrics"])
        for one in contents(after)
        if isinstance(one, Lines) and one.run == "f"
        for record in map(json.loads, one.lines)
    ]
    assert told == [
        (1, {"loss": 1.0}),
        (2, {"loss": 2.0}),
        (3, {"loss": 3.0}),
        (3, {"eval": 9.0}),
        (4, {"loss": 4.0}),
    ]


def test_what_was_delivered_is_remembered_for_each_server(outbox: Outbox) -> None:
    outbox.append(Tags(run="a", tags={"x": "1"}), Tags(run="a", tags={"x": "2"}))
    first = "http://name:secret@one:5000"
    state = outbox.delivered(first)
    assert outbox.waiting(first) == 2
    _, offset = next(outbox.read(0))
    outbox.note(state.model_copy(update={"offset": offset, "runs": {"a": "123"}}))
    again = Outbox(outbox.folder)
    assert again.waiting(first) == 1
    assert again.delivered(first).runs == {"a": "123"}
    assert again.delivered("http://two:5000").runs == {}  # another server is told everything
    assert again.waiting("http://two:5000") == 2
    assert "secret" not in (outbox.folder / "delivered.json").read_text()


def test_a_document_waits_as_a_copy(outbox: Outbox, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("one")
    first = outbox.keep(path)
    assert outbox.keep(path) == first
    path.write_text("two")
    second = outbox.keep(path)
    assert [(outbox.folder / place).read_text() for place in (first, second)] == ["one", "two"]
    assert {Path(place).name for place in (first, second)} == {"report.json"}


def test_an_identity_is_made_once(outbox: Outbox, tmp_path: Path) -> None:
    assert outbox.identity() == Outbox(outbox.folder).identity()
    assert outbox.identity() != Outbox(tmp_path / "other").identity()


def test_one_process_delivers(outbox: Outbox) -> None:
    outbox.append(Tags(run="a", tags={}))
    with outbox.delivering() as first, Outbox(outbox.folder).delivering() as second:
        assert (first, second) == (True, False)
    with outbox.delivering() as first:
        assert first


def test_what_is_forgotten_is_gone_but_for_the_identity(outbox: Outbox, tmp_path: Path) -> None:
    identity = outbox.identity()
    outbox.append(Tags(run="a", tags={}))
    path = tmp_path / "report.json"
    path.touch()
    outbox.keep(path)
    outbox.note(Delivered(server="x", offset=outbox.size()))
    outbox.forget()
    assert contents(outbox) == []
    assert outbox.identity() == identity
    assert not (outbox.folder / "files").exists()

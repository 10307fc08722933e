from __future__ import annotations

from pathlib import Path

import pytest

from infra.heartbeat import Beat, HeartbeatWriter, read_beat
from infra.launch import _Watch


def test_the_newest_sign_of_life_is_read(tmp_path: Path) -> None:
    assert read_beat(tmp_path) is None
    writer = HeartbeatWriter(tmp_path)
    assert read_beat(tmp_path) is None
    writer.beat("a long description of what is being done")
    writer.beat("größer \n\x00 \"'")
    assert read_beat(tmp_path) == Beat(2, "größer \n\x00 \"'")


def test_any_text_fits_and_is_cut(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path)
    for text in ("\x00" * 1000, "ü" * 1000, '"' * 1000):
        writer.beat(text)
        beat = read_beat(tmp_path)
        assert beat is not None and beat.doing == text[:300]
        assert (tmp_path / "heartbeat.json").stat().st_size == 2048


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"number": "x", "doing": ""}', "3"])
def test_a_part_of_a_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "heartbeat.json").write_text(text)
    assert read_beat(tmp_path) is None


def test_only_standing_still_counts_as_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("infra.launch.time.monotonic", lambda: now)
    watch = _Watch("train_sft", tmp_path, 10.0)
    writer = HeartbeatWriter(tmp_path)
    for _ in range(5):  # 45 s in all, each 9 s with a sign of life
        now += 9.0
        writer.beat("step")
        assert not watch.hung()
    now += 9.0
    assert not watch.hung()
    now += 2.0
    assert watch.hung()
    assert str(watch.failure(-9)).startswith(
        "train_sft hung: it made no progress for 11 s while step (sign of life 5)"
    )


def test_without_a_limit_nothing_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("infra.launch.time.monotonic", lambda: now)
    watch = _Watch("train_sft", tmp_path, None)
    now = 1e9
    assert not watch.hung()

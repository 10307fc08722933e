"""Disks that fill up or turn read-only, and clocks that jump."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import Play, Row, sampled
from tests.faults.house import OTHERS, TRAINING
from tests.faults.inject import Fault
from tests.faults.trials import Trial

pytestmark = pytest.mark.faults

_YEAR = 365 * 86_400


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    if os.geteuid() != 0:
        return False
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[None]:
    """Put a folder on a disk of its own, with so many bytes of room beside what it holds."""
    aside = folder.with_name(f"{folder.name} aside")
    folder.rename(aside)
    folder.mkdir()
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in aside.rglob("*"))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={used + room}", "tmpfs", str(folder)], check=True
    )
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(aside)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=256m", str(folder)], check=True)


def result_of(trial: Trial) -> dict[str, object]:
    found: dict[str, object] = json.loads((trial.work / "result.json").read_bytes())
    return found


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small disk")
@pytest.mark.parametrize("case", TRAINING)
def test_a_disk_that_is_really_full(play: Play, case: str) -> None:
    """It ends with the cause and the remedy, is not tried again, and goes on when there is room."""

    def row(seed: int) -> Row:
        def body(trial: Trial) -> None:
            # Less than two checkpoints and the artifact need.
            room = random.Random(f"disk {case} {seed}").randrange(100_000, 400_000)
            with small_disk(trial.store.root, room):
                ended = trial.attempt()
                assert ended.code == 1, ended
                result = result_of(trial)
                assert "the disk is full" in str(result["message"])
                assert str(trial.work) in str(result["message"])
                assert not result["retryable"]
                assert not list(trial.checkpoints.glob(".step-*"))
                enlarge(trial.store.root)
                trial.compare()

        return Row("disk full", "a small disk", f"seed {seed}", body)

    play(case, [row(seed) for seed in range(2)])


@pytest.mark.parametrize("case", sampled((*TRAINING, *OTHERS), "train_sft"))
def test_an_operation_that_finds_the_disk_full(play: Play, case: str) -> None:
    """At any file that is opened for writing."""

    def row(seed: int) -> Row:
        def body(trial: Trial) -> None:
            nth = random.Random(f"ENOSPC {case} {seed}").randint(1, 4)
            ended = trial.attempt(Fault("ENOSPC", "write", r"/(content|checkpoints|publish)/", nth))
            assert trial.struck()
            assert ended.code == 1, ended
            result = result_of(trial)
            assert "the disk is full" in str(result["message"])
            assert not result["retryable"]
            trial.compare()

        return Row("disk full", "an operation", f"seed {seed}", body)

    play(case, [row(seed) for seed in range(2)])


@pytest.mark.parametrize("case", ["train_sft", "train_rl:grpo", "evaluate:grpo", *OTHERS[:2]])
def test_a_store_that_turns_read_only(play: Play, case: str) -> None:
    """Even the last words cannot be written then; they are in the log that is already open."""

    def row(seed: int) -> Row:
        def body(trial: Trial) -> None:
            nth = random.Random(f"EROFS {case} {seed}").randint(1, 4)
            fault = Fault("EROFS", "write", r"/store/", nth=nth, lasting=True)
            ended = trial.attempt(fault)
            assert trial.struck()
            assert ended.code == 1, ended
            last = trial.log_text().splitlines()[-1]
            assert "Read-only file system" in last and str(trial.root) in last
            trial.compare()

        return Row("read-only store", "in mid-stage", f"seed {seed}", body)

    play(case, [row(seed) for seed in range(2)])


@pytest.mark.parametrize("case", [*TRAINING, "evaluate:grpo", "prepare_data:demonstrations"])
def test_a_clock_that_jumps(play: Play, case: str) -> None:
    """Forward or back by a year; then a kill, and on with the right time."""

    def row(years: int) -> Row:
        def body(trial: Trial) -> None:
            jump = Fault("clock", "write", r"/store/", nth=2, number=years * _YEAR)
            if case in TRAINING:
                ended = trial.attempt(jump, Fault("kill", "os.rename", r"/\.step-", nth=2))
                assert trial.struck(0) and trial.struck(1), ended
            trial.attempt(jump)
            assert trial.struck()
            trial.compare()

        return Row("clock jump", "a year forward" if years > 0 else "a year back", str(years), body)

    play(case, [row(years) for years in (1, -1)])

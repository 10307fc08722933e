"""The fault matrix: `make test-faults` runs all of it, `make test` the cases marked slow."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.faults.house import House
from tests.faults.matrix import Matrix
from tests.faults.matrix import Trial as Entry
from tests.faults.processes import launched
from tests.faults.trials import Trial, describe, forked
from tests.faults.zygote import Zygote

_MATRIX = Matrix()
_WORKERS = 2


@dataclass(frozen=True)
class Row:
    """A trial to be made."""

    fault: str
    moment: str
    repeat: str
    body: Callable[[Trial], None]
    how: Literal["forked", "process"] = "forked"


Play = Callable[[str, Sequence[Row]], None]


def sampled(cases: Sequence[str], *sample: str) -> list[object]:
    """Cases as parameters, those of `make test` marked slow."""
    assert set(sample) <= set(cases)
    return [pytest.param(c, marks=pytest.mark.slow) if c in sample else c for c in cases]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m faults` only the sample is run."""
    if "faults" in (config.getoption("markexpr") or ""):
        return
    whole = [item for item in items if item.get_closest_marker("faults")]
    dropped = [item for item in whole if not item.get_closest_marker("slow")]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the matrix, and write it where POSTTRAIN_FAULT_MATRIX says (.md or .json)."""
    if not _MATRIX.trials:
        return
    terminalreporter.section("fault matrix")
    for line in _MATRIX.lines():
        terminalreporter.write_line(line)
    for name in filter(None, os.environ.get("POSTTRAIN_FAULT_MATRIX", "").split(os.pathsep)):
        _MATRIX.write(Path(name))


@pytest.fixture(scope="session")
def matrix() -> Matrix:
    return _MATRIX


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path has spaces and Unicode: every trial is below it."""
    return tmp_path_factory.mktemp("faults") / "Läufe und Versuche"


@pytest.fixture(scope="session")
def zygotes() -> Iterator[queue.SimpleQueue[Zygote]]:
    found: queue.SimpleQueue[Zygote] = queue.SimpleQueue()
    made = [Zygote() for _ in range(_WORKERS)]
    for zygote in made:
        found.put(zygote)
    yield found
    for zygote in made:
        zygote.__exit__()


@pytest.fixture(scope="session")
def house(root: Path, zygotes: queue.SimpleQueue[Zygote]) -> House:
    zygote = zygotes.get()
    zygotes.put(zygote)
    return House(root / "Haus", zygote)


@pytest.fixture
def play(house: House, zygotes: queue.SimpleQueue[Zygote], root: Path, matrix: Matrix) -> Play:
    """Makes trials of a stage, two at a time, notes them, and fails with what went wrong."""

    def one(case: str, row: Row) -> str:
        zygote = zygotes.get()
        folder = root / f"{case.replace(':', ' ')} {len(matrix.trials)} {id(row)}"
        problem = ""
        trial = None
        try:
            run = forked(zygote, folder) if row.how == "forked" else launched
            trial = Trial(house, case, folder, run)
            row.body(trial)
        except Exception as error:
            problem = describe(error) if str(error) else repr(error)
            kept = f"; kept: {folder}"
        else:
            trial.remove()
        finally:
            zygotes.put(zygote)
        entry = Entry(row.fault, row.moment, case, row.how, row.repeat, not problem, problem)
        matrix.add(entry)
        return f"{row.fault}, {row.moment} ({row.repeat}): {problem}{kept}" if problem else ""

    def play(case: str, rows: Sequence[Row]) -> None:
        house.reference(case)
        with ThreadPoolExecutor(_WORKERS) as pool:
            problems = [text for text in pool.map(lambda row: one(case, row), rows) if text]
        assert not problems, "\n".join([f"{case}:", *problems])

    return play

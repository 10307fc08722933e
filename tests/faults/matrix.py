"""The table of faults: what was done to which stage, how often, and whether it changed a bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

HOW = {
    "forked": "the stage's own entry point in a child forked from a process with its imports done",
    "process": "`python -m stages.main`, started by `infra.launch.run_stage`",
    "session": "a whole run without Prefect, with a real MLflow database, forked likewise",
    "command": "`posttrain run` with its Prefect server, its MLflow database and its processes",
}


@dataclass(frozen=True)
class Trial:
    """One trial that is over."""

    fault: str
    moment: str
    stage: str
    how: str
    """What was real: a key of `HOW`."""
    repeat: str
    """Seed or number that makes the same trial again."""
    identical: bool
    problem: str = ""


class Matrix:
    """Collects trials; safe to use from several threads."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self._lock = Lock()

    def add(self, trial: Trial) -> None:
        """Note a trial."""
        with self._lock:
            self.trials.append(trial)

    def lines(self) -> list[str]:
        """The table in Markdown."""
        header = [
            "| fault | moment | stage | how | trials | identical |",
            "|---|---|---|---|---|---|",
        ]
        rows = [
            f"| {fault} | {moment} | {_stages(own)} | {how} | {len(own)} | {_verdict(own)} |"
            for (fault, moment, how), own in self._grouped()
        ]
        failed = sum(not trial.identical for trial in self.trials)
        by_kind: dict[str, int] = {}
        for trial in self.trials:
            by_kind[trial.how] = by_kind.get(trial.how, 0) + 1
        kinds = ", ".join(f"{count} {how}" for how, count in sorted(by_kind.items()))
        total = f"{len(self.trials)} trials ({kinds}); {failed} not identical."
        legend = [f"- {how}: {what}" for how, what in HOW.items() if how in by_kind]
        return [*header, *rows, "", total, "", *legend]

    def write(self, path: Path) -> None:
        """Write every trial as JSON, or the table as Markdown, by the name's ending."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            text = json.dumps([asdict(trial) for trial in self.trials], indent=1)
        else:
            text = "\n".join(self.lines())
        path.write_text(text + "\n", encoding="utf-8")

    def _grouped(self) -> Iterator[tuple[tuple[str, str, str], list[Trial]]]:
        groups: dict[tuple[str, str, str], list[Trial]] = {}
        for trial in self.trials:
            key = (trial.fault, trial.moment, trial.how)
            groups.setdefault(key, []).append(trial)
        yield from sorted(groups.items())


def _stages(trials: list[Trial]) -> str:
    """Stages in order, each with its number of trials where that is more than one."""
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.stage] = counts.get(trial.stage, 0) + 1
    return ", ".join(name if n == 1 else f"{name} x{n}" for name, n in sorted(counts.items()))


def _verdict(trials: list[Trial]) -> str:
    bad = [trial.repeat for trial in trials if not trial.identical]
    return f"NO: {', '.join(bad)}" if bad else "yes"

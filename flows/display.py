"""What a person sees: the plan, the progress, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows.plan import Plan
from flows.runs import RunRecord, StageRow
from infra.environment import Home
from infra.redaction import redact

_ACTION_STYLES = {"reuse": "green", "resume": "yellow", "run": "cyan"}
_STATUS_STYLES = {"reused": "green", "resumed": "yellow", "ran": "cyan"}


def make_console(*, stderr: bool) -> Console:
    """A console; wide enough for the tables where there is no terminal."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        return Console(stderr=stderr, highlight=False, width=120)
    return console


def plan_table(plan: Plan) -> Table:
    """Which stages run, which are reused, and why."""
    table = Table(title="Plan", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "action", "why", "fingerprint"):
        table.add_column(column, overflow="fold")
    for stage in plan.stages:
        table.add_row(
            stage.name,
            Text(stage.action, style=_ACTION_STYLES[stage.action]),
            stage.reason,
            stage.fingerprint[:12] if stage.fingerprint else "",
        )
    return table


class PlainProgress:
    """One line when a stage begins and one when it ends, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def started(self, name: str) -> None:
        """Say that a stage begins."""
        self._say(f"{name}: started")

    def line(self, name: str, text: str) -> None:
        """Leave the stage's own lines to its log."""

    def done(self, row: StageRow) -> None:
        """Say how a stage ended."""
        self._say(f"{row.name}: {_ended(row)}")

    def note(self, text: str) -> None:
        """Say something by the way."""
        self._say(text)

    def _say(self, text: str) -> None:
        self.console.print(Text(text))


class LiveProgress:
    """A spinner, the time, and the last line of each stage, on a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.fields[label]}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            refresh_per_second=4,
        )
        self._tasks: dict[str, Any] = {}
        self._last = 0.0

    def __enter__(self) -> LiveProgress:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def started(self, name: str) -> None:
        """Show a stage's line."""
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task("", total=1, label=f"{name:<34}")
        else:
            self.progress.reset(self._tasks[name], description="again")

    def line(self, name: str, text: str) -> None:
        """Show the stage's newest line, a few times a second at most."""
        now = time.monotonic()
        if name in self._tasks and text.strip() and now - self._last > 0.2:
            self._last = now
            self.progress.update(self._tasks[name], description=self._cut(text.strip()))

    def done(self, row: StageRow) -> None:
        """Tick a stage off."""
        if row.name not in self._tasks:
            self.started(row.name)
        self.progress.update(self._tasks[row.name], completed=1, description=_ended(row))

    def note(self, text: str) -> None:
        """Print something above the lines."""
        self.progress.console.print(Text(text))

    def _cut(self, text: str) -> str:
        room = max(20, self.console.width - 50)
        return text if len(text) <= room else f"{text[: room - 1]}…"


def make_progress(console: Console) -> LiveProgress | PlainProgress:
    """A live display on a terminal, lines elsewhere."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


def print_run(console: Console, record: RunRecord) -> None:
    """The tables of a run: stages, models, reward models, and the decision."""
    console.print()
    console.print(_stages_table(record.stages))
    if record.evaluation is not None:
        console.print()
        console.print(_models_table(record.evaluation))
    line = _reward_models_line(record.reward_models)
    if line:
        console.print()
        console.print(Text(line))
    if record.decision is not None:
        console.print()
        _print_decision(console, record.decision)
    if record.outcome is not None and record.status != "finished":
        console.print()
        console.print(Text(f"{record.run} {record.status}: {record.outcome}"))


def print_places(console: Console, record: RunRecord, home: Home) -> None:
    """Where to look further."""
    console.print()
    for label, place in (
        ("run", f"posttrain show {record.run}"),
        ("store", record.store),
        ("MLflow", _mlflow_place(home, record.mlflow_run_id)),
        ("Prefect", f"PREFECT_HOME={home.prefect_home} prefect server start"),
    ):
        console.print(Text(f"{label:<8}{place}"), soft_wrap=True)


def runs_table(records: Sequence[RunRecord]) -> Table:
    """The runs of a store, the newest first."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "started", "pass@1", "decision"):
        table.add_column(column, overflow="fold")
    for record in records:
        scores = (record.evaluation or {}).get("candidate") or {}
        table.add_row(
            record.run,
            record.status,
            f"{record.started:%Y-%m-%d %H:%M:%S}",
            _percent(scores.get("pass@1")),
            _decision_words(record.decision) if record.decision else "",
        )
    return table


def _mlflow_place(home: Home, run_id: str | None) -> str:
    run = f"run {run_id}" if run_id else "away so far: posttrain sync tells it of the run"
    place = redact(home.mlflow_uri)
    if place.startswith("http"):
        return f"{place} ({run})"
    return f"mlflow server --backend-store-uri {place} ({run})"


def _stages_table(rows: Sequence[StageRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("stage", overflow="fold")
    table.add_column("status")
    table.add_column("seconds", justify="right")
    table.add_column("peak memory", justify="right")
    table.add_column("artifact", overflow="fold")
    for row in rows:
        peak = row.peak_memory_bytes
        table.add_row(
            row.name,
            Text(row.status, style=_STATUS_STYLES[row.status]),
            f"{row.seconds:.1f}" if row.status != "reused" else "",
            f"{peak / 2**20:,.0f} MiB" if peak is not None else "",
            f"artifacts/{row.fingerprint[:12]}…",
        )
    return table


def _models_table(evaluation: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for column in ("pass@1", "KL to SFT", "length", "truncated", "records"):
        table.add_column(column, justify="right")
    is_baseline = evaluation["incumbent"] == evaluation["baseline"]
    names = [("baseline", "SFT baseline"), ("incumbent", "incumbent"), ("candidate", "candidate")]
    for key, label in names:
        if key == "incumbent" and is_baseline:
            label = "incumbent (the SFT baseline)"
        scores = evaluation[key]
        table.add_row(
            label,
            _percent(scores["pass@1"]),
            f"{scores['kl']:.2f}",
            f"{scores['length']:.1f}",
            _percent(scores["truncated_fraction"]),
            str(scores["num_records"]),
            style="bold" if key == "candidate" else "",
        )
    return table


def _reward_models_line(reward_models: dict[str, Any]) -> str:
    parts: list[str] = []
    outcome, process = reward_models.get("outcome"), reward_models.get("process")
    if outcome:
        parts.append(f"outcome reward model: accuracy {_percent(outcome['accuracy'])}")
    if process:
        parts.append(
            f"process reward model: step accuracy {_percent(process['step_accuracy'])}, "
            f"first-error F1 {process['first_error_f1']:.3f}"
        )
    return "; ".join(parts)


def _print_decision(console: Console, decision: dict[str, Any]) -> None:
    style = "bold green" if decision["promoted"] else "bold yellow"
    console.print(Text(_decision_words(decision), style=style))
    for reason in decision["reasons"]:
        console.print(Text(f"  - {reason}"))


def _decision_words(decision: dict[str, Any]) -> str:
    verdict = "promoted" if decision["promoted"] else "refused"
    if decision.get("awaiting_approval"):
        verdict = "awaiting approval"
    aliases = ", ".join(f"@{alias}" for alias in decision["aliases"])
    model = f"{decision['registered_model']} version {decision['version']}"
    return f"{verdict}: {model}" + (f" ({aliases})" if aliases else "")


def _ended(row: StageRow) -> str:
    if row.status == "reused":
        return "reused"
    peak = row.peak_memory_bytes
    memory = f", peak {peak / 2**20:,.0f} MiB" if peak is not None else ""
    return f"{row.status} in {row.seconds:.1f} s{memory}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"

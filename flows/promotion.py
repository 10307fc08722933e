"""What the command line does with decisions: explain one, or say what a person thinks of it."""

from __future__ import annotations

import getpass
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.archive import Archive
from flows.runs import Runs
from infra.environment import Home
from schemas.artifacts import GateCheck, ModelScores, PromotionDecision
from schemas.base import UserError

_MODELS = ("candidate", "baseline", "incumbent")


def find_decision(home: Home, target: str) -> PromotionDecision:
    """The decision of a run by name (or `latest`), or on `NAME[@ALIAS|@VERSION]`, verified."""
    runs = Runs(home.store.root)
    record = next((one for one in runs.all() if target in (one.run, "latest")), None)
    if record is not None:
        rows = [row for row in record.stages if row.name == "promote"]
        if not rows:
            raise UserError(f"run {record.run} came to no decision: it is {record.status}")
        fingerprint, what = rows[0].fingerprint, f"run {record.run}"
    else:
        version = Archive(home, target.partition("@")[0]).registry.find(target)
        fingerprint = version.tags.get("posttrain.decision", "none")
        what = f"model {version.name} version {version.version}"
    decision = home.store.find_verified(fingerprint)
    if not isinstance(decision, PromotionDecision):
        raise UserError(f"the store does not hold the decision on {what}; run its recipe again")
    return decision


def document(home: Home, decision: PromotionDecision) -> dict[str, Any]:
    """What `posttrain promote --explain --json` prints: all that the decision was made from."""
    archive = Archive(home, decision.registered_model)
    aliases, rolled_back = archive.aliases_now(decision)
    text = (home.store.path(decision) / "decision.json").read_text(encoding="utf-8")
    return {
        **json.loads(text),
        "outcome": decision.outcome,
        "decision": decision.fingerprint,
        "reasons": list(decision.reasons),
        "aliases": list(aliases),
        "rolled_back": rolled_back,
    }


def print_decision(console: Console, found: dict[str, Any]) -> None:
    """Every check with its number and limit, what it was made from, and the models' metrics."""
    aliases = "".join(f" @{alias}" for alias in found["aliases"])
    head = f"{found['registered_model']} version {found['version']}{aliases}: {found['outcome']}"
    console.print(Text(head, style="bold"))
    said = found["approval"]
    if said is not None:
        verdict = "approved" if said["granted"] else "refused"
        console.print(Text(f"{verdict} by {said['by']} at {said['when']}: {said['reason']}"))
    if found["rolled_back"] is not None:
        console.print(Text(f"rolled back since then: {found['rolled_back']}", style="yellow"))
    console.print()
    console.print(_checks([GateCheck.model_validate(one) for one in found["checks"]]))
    console.print()
    console.print(_metrics(found))


def approve(home: Home, model: str, *, granted: bool, by: str | None, reason: str) -> str:
    """Say what a person thinks of a version that waits; one sentence on what came of it."""
    name, which = split(model)
    archive = Archive(home, name)
    decision = archive.approve(which, granted=granted, by=by or getpass.getuser(), reason=reason)
    held, rolled_back = archive.aliases_now(decision)
    aliases = "".join(f" @{alias}" for alias in held)
    since = f"; rolled back since then: {rolled_back}" if rolled_back is not None else ""
    return f"{name} version {decision.version}: {decision.outcome}{aliases}{since}"


def split(model: str, version: str | None = None) -> tuple[str, str]:
    """The name and the alias or number of `NAME@VERSION`, `NAME/VERSION`, or the two apart."""
    for sign in ("@", "/"):
        name, found, which = model.partition(sign)
        if found and which and version is None:
            return name, which
    if version is None:
        model = model.rstrip("@/")
        raise UserError(f"name a version of {model}: {model}@VERSION, or an alias; see `models`")
    return model, version.removeprefix("@")


def _checks(checks: list[GateCheck]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("check", overflow="fold")
    table.add_column("", overflow="fold")
    table.add_column("number", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("why", overflow="fold")
    for check in checks:
        verdict = Text("pass", style="green") if check.passed else Text("FAIL", style="bold red")
        observed = "" if check.observed is None else f"{check.observed:.4f}"
        required, why = f"{check.required:.4f}", Text(check.reason)
        table.add_row(Text(check.rule), verdict, observed, required, why)
        if check.numbers:
            numbers = ", ".join(f"{name} {value:.6g}" for name, value in check.numbers.items())
            table.add_row("", "", "", "", Text(numbers, style="dim"))
    return table


def _metrics(found: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for model in _MODELS:
        table.add_column(model, justify="right")
    scores = {model: _flat(found[model]) for model in _MODELS}
    for name in scores["candidate"]:
        table.add_row(name, *(f"{scores[model][name]:.4f}" for model in _MODELS))
    return table


def _flat(scores: dict[str, Any]) -> dict[str, float]:
    return ModelScores.model_validate(scores).metrics()

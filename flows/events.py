"""What a run tells Prefect beside its states: events for automations, a page for people.

Events: `posttrain.stage.failed`, `posttrain.model.promoted`, `posttrain.model.refused`,
`posttrain.model.awaiting_approval`. Prefect adds the flow run, its deployment and its work pool to
each by itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from flows.graph import Node
from flows.session import Session
from infra.redaction import redact, redact_value
from schemas.artifacts import PromotionDecision

_log = logging.getLogger(__name__)

STAGE_FAILED = "posttrain.stage.failed"
MODEL_PROMOTED = "posttrain.model.promoted"
MODEL_REFUSED = "posttrain.model.refused"
MODEL_AWAITING_APPROVAL = "posttrain.model.awaiting_approval"


def stage_failed(session: Session, node: Node, error: object) -> None:
    """A stage was given up: no try is left, or another one would not help."""
    run = session.run.record.run
    _emit(
        STAGE_FAILED,
        {"prefect.resource.id": f"posttrain.stage.{run}.{node.name}", "stage": node.name},
        _run_resource(run),
        {"run": run, "recipe": session.config.name, "stage": node.name, "error": str(error)},
    )


def decided(run: str, recipe: str, decision: PromotionDecision) -> None:
    """The gate, or a person, has judged a model that a run made."""
    event = MODEL_PROMOTED if decision.promoted else MODEL_REFUSED
    if decision.awaiting_approval:
        event = MODEL_AWAITING_APPROVAL
    model = f"{decision.registered_model}/{decision.version}"
    _emit(
        event,
        {
            "prefect.resource.id": f"posttrain.model.{decision.registered_model}",
            "prefect.resource.name": model,
            "version": decision.version,
        },
        _run_resource(run),
        {
            "run": run,
            "recipe": recipe,
            "model": decision.registered_model,
            "version": decision.version,
            "aliases": list(decision.aliases),
            "reasons": list(decision.reasons),
            "decision": decision.fingerprint,
        },
    )


def decision_page(session: Session, decision: PromotionDecision) -> None:
    """A Prefect artifact with the decision, its numbers, and where to look further."""
    key = "posttrain-" + re.sub("[^a-z0-9]+", "-", session.config.name.lower()).strip("-")
    try:
        create_markdown_artifact(redact(page(session, decision)), key=key, description="Decision")
    except Exception as error:  # Prefect's page is a convenience: the run has its result
        _log.warning("Prefect did not take the page of the decision: %s", error)


def page(session: Session, decision: PromotionDecision) -> str:
    """The decision in Markdown."""
    lines = [
        f"# {decision.registered_model} version {decision.version}: {decision.outcome}",
        "",
        "| rule | passed | observed | required | why |",
        "|---|---|---|---|---|",
    ]
    for check in decision.checks:
        observed = "" if check.observed is None else f"{check.observed:.4f}"
        numbers = f"{observed} | {check.required:.4f}"
        passed = "yes" if check.passed else "**no**"
        reason = check.reason.replace("|", "\\|")
        lines.append(f"| {check.rule} | {passed} | {numbers} | {reason} |")
    record = session.run.record
    lines += [
        "",
        f"- run `{record.run}`: `posttrain show {record.run}`",
        f"- MLflow run `{session.mlflow_run_id}` at {_place(session.home.mlflow_uri)}",
        f"- decision `{session.store.root / decision.uri}`",
        f"- lineage: `posttrain lineage {decision.registered_model}/{decision.version}`",
    ]
    return "\n".join(lines) + "\n"


def _place(uri: str) -> str:
    """An address without the name and password that it may hold."""
    parts = urlsplit(uri)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return f"<{bare}>" if parts.scheme.startswith("http") else f"`{bare}`"


def _run_resource(run: str) -> dict[str, str]:
    return {
        "prefect.resource.id": f"posttrain.run.{run}",
        "prefect.resource.role": "posttrain-run",
        "prefect.resource.name": run,
    }


def _emit(
    event: str, resource: dict[str, str], run: dict[str, str], payload: Mapping[str, Any]
) -> None:
    try:
        emit_event(event, resource, related=[run], payload=redact_value(payload))
    except Exception as error:  # an event that is lost must not fail a run
        _log.warning("Prefect did not take the event %s: %s", event, error)

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

from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from flows.graph import Node
from flows.session import Session
from infra.mlflow_uri import is_server, without_password
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
        *_mlflow_lines(session.home.mlflow_uri, session.mlflow_run_id, decision),
        f"- decision `{session.store.root / decision.uri}`",
        f"- lineage: `posttrain lineage {decision.registered_model}/{decision.version}`",
    ]
    return "\n".join(lines) + "\n"


def _mlflow_lines(uri: str, run_id: str | None, decision: PromotionDecision) -> list[str]:
    """Links to the run and the model on MLflow's pages; a local database has none."""
    from infra.mlflow_tracking import Tracking

    place = without_password(uri)
    if run_id is None:
        return [f"- MLflow at `{place}` has not been told of the run yet: `posttrain sync`"]
    if not is_server(uri):
        return [f"- MLflow run `{run_id}` at `{place}`"]
    experiment = Tracking(uri).client.get_run(run_id).info.experiment_id
    base = place.rstrip("/")
    model = f"{decision.registered_model}/versions/{decision.version}"
    return [
        f"- MLflow: [run]({base}/#/experiments/{experiment}/runs/{run_id}), "
        f"[model version]({base}/#/models/{model})"
    ]


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

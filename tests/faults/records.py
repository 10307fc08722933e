"""What a run leaves in MLflow and in the registry, in a form that can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from infra.environment import Home
from infra.mlflow_tracking import metric_name
from tests.faults.house import Metrics


def client_of(home: Home) -> MlflowClient:
    """The client of a home's own database."""
    return MlflowClient(tracking_uri=home.mlflow_uri, registry_uri=home.mlflow_uri)


def registry_of(home: Home) -> list[dict[str, Any]]:
    """Every version: number, content and aliases, in order."""
    client = client_of(home)
    found = []
    for model in client.search_registered_models():
        holders = client.get_registered_model(model.name).aliases
        for version in client.search_model_versions(f"name = '{model.name}'"):
            number = str(version.version)
            found.append(
                {
                    "name": model.name,
                    "version": number,
                    "sha256": version.tags["posttrain.sha256"],
                    "fingerprint": version.tags["posttrain.fingerprint"],
                    "incumbent": version.tags["posttrain.incumbent"],
                    "aliases": sorted(a for a, held in holders.items() if str(held) == number),
                }
            )
    return sorted(found, key=lambda one: (one["name"], int(one["version"])))


def runs_of(home: Home) -> dict[str, list[str]]:
    """Statuses of the runs by name; `pipeline` for those that have no parent."""
    client = client_of(home)
    found: dict[str, list[str]] = {}
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        nested = "mlflow.parentRunId" in run.data.tags
        name = run.data.tags["posttrain.stage"] if nested else "pipeline"
        found.setdefault(name, []).append(run.info.status)
    return found


def own_runs(home: Home) -> set[str]:
    """Ids of the runs in a home's database."""
    client = client_of(home)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return {run.info.run_id for run in client.search_runs(experiments)}


def check_metrics(home: Home, stage: str, expected: Metrics) -> None:
    """Every metric of every step of a stage is in MLflow, and once.

    MLflow sorts by time, which need not be the order of the steps where a clock has jumped.
    """
    client = client_of(home)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`posttrain.stage` = '{stage}'")
    for name in {name for _, name in expected}:
        history = client.get_metric_history(run.info.run_id, metric_name(name))
        ours = [(metric.step, metric.value) for metric in history]
        theirs = [(step, value) for (step, own), value in sorted(expected.items()) if own == name]
        # The artifact's final numbers are logged too, at step 0.
        final = {pair for pair in ours if pair[0] == 0 and pair in theirs}
        ours = sorted([*final, *(pair for pair in ours if pair[0] != 0)])
        assert ours == theirs, f"{stage} {name}: {ours} in MLflow, not {theirs}"


def template(folder: Path) -> Path:
    """A database without a run; making its tables takes seconds, copying it none."""
    from infra.mlflow_tracking import Tracking

    folder.mkdir(parents=True)
    path = folder / "mlflow.db"
    Tracking(f"sqlite:///{path}").client.search_experiments()
    return path

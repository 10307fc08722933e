"""Reads the deployment files as the programs they are written for would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
DEPLOYMENT = REPOSITORY / "infra" / "deployment"
COMPOSE = DEPLOYMENT / "compose.yaml"
KUBERNETES = DEPLOYMENT / "kubernetes"
GPU_TEMPLATE = KUBERNETES / "base" / "gpu-base-job-template.json"

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<kind>:-|:\?)?(?P<rest>[^}]*)\}")


def interpolate(value: Any, environment: Mapping[str, str]) -> Any:
    """The `${NAME}`, `${NAME:-default}` and `${NAME:?message}` of a compose file filled in."""

    def fill(match: re.Match[str]) -> str:
        found = environment.get(match["name"])
        if found:
            return found
        if match["kind"] == ":-":
            return match["rest"]
        raise LookupError(f"{match['name']}: {match['rest']}")

    if isinstance(value, str):
        return _VARIABLE.sub(fill, value)
    if isinstance(value, list):
        return [interpolate(one, environment) for one in value]
    if isinstance(value, dict):
        return {key: interpolate(one, environment) for key, one in value.items()}
    return value


def secret_names() -> list[str]:
    """The variables that env.example asks for."""
    lines = (DEPLOYMENT / "env.example").read_text().splitlines()
    return [line.removesuffix("=") for line in lines if line and not line.startswith("#")]


def compose(environment: Mapping[str, str]) -> dict[str, Any]:
    """The compose file as it is with these variables."""
    document: dict[str, Any] = interpolate(yaml.safe_load(COMPOSE.read_text()), environment)
    return document


def kustomized(folder: str) -> list[dict[str, Any]]:
    """The resources that `kubectl apply --kustomize` would send."""
    kubectl = shutil.which("kubectl")
    assert kubectl
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def manifests() -> list[dict[str, Any]]:
    """Every resource of the manifests as it is written, without kustomize."""
    paths = [one for one in KUBERNETES.rglob("*.yaml") if one.name != "kustomization.yaml"]
    return [one for path in sorted(paths) for one in yaml.safe_load_all(path.read_text())]


def pods(resources: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of a workload and the specification of its pods."""
    for one in resources:
        if one["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield one["metadata"].get("name", "run"), one["spec"]["template"]["spec"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [*pod.get("initContainers", []), *pod["containers"]]
    return found


def gpu_template() -> dict[str, Any]:
    template: dict[str, Any] = json.loads(GPU_TEMPLATE.read_text())
    return template

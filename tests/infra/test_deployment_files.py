"""The image, the compose file and the manifests: valid, pinned, closed, and true to the code."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import kubernetes_validate
import mlflow.environment_variables
import pytest
import yaml
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from prefect.client.schemas.objects import FlowRun
from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names
from prefect.utilities.templating import apply_values, find_placeholders
from setuptools import find_namespace_packages

from tests.infra.deployment_files import (
    COMPOSE,
    DEPLOYMENT,
    GPU_TEMPLATE,
    KUBERNETES,
    REPOSITORY,
    compose,
    containers,
    gpu_template,
    interpolate,
    kustomized,
    manifests,
    pods,
    secret_names,
)

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
SECRETS = {name: f"value-of-{name}" for name in secret_names()}
SERVICES: dict[str, dict[str, Any]] = compose(SECRETS)["services"]
SHUT = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")

KUBERNETES_WORKER_SETTINGS = {
    "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME",
}
"""Settings of prefect-kubernetes, checked against it where it is installed."""
OTHERS = {
    "AWS_ACCESS_KEY_ID": "boto3 and SeaweedFS",
    "AWS_DEFAULT_REGION": "boto3",
    "AWS_SECRET_ACCESS_KEY": "boto3 and SeaweedFS",
    "DO_NOT_TRACK": "all of them",
    "HF_HOME": "huggingface_hub",
    "HOME": "the C library",
    "PGDATA": "the image of PostgreSQL",
    "PGPASSWORD": "libpq",
    "POSTGRES_INITDB_ARGS": "the image of PostgreSQL",
    "POSTGRES_PASSWORD": "the image of PostgreSQL",
    "POSTGRES_USER": "the image of PostgreSQL",
}
"""Variables that neither Prefect nor MLflow reads, and who does."""


def images() -> Iterator[str]:
    for name in ("compose.yaml", "compose.gpu.yaml"):
        document = yaml.safe_load((DEPLOYMENT / name).read_text())
        yield from (one["image"] for one in document["services"].values())
    parents = DockerfileParser(path=str(DEPLOYMENT / "Dockerfile")).parent_images
    yield from (one for one in parents if one not in stages())
    yield gpu_template()["variables"]["properties"]["image"]["default"]
    if shutil.which("kubectl"):
        for _, pod in pods(kustomized("standalone")):
            yield from (one["image"] for one in containers(pod))


def environments() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place where variables are set, and the variables."""
    for name, service in SERVICES.items():
        yield f"compose: {name}", service.get("environment", {})
    for name, pod in pods(manifests()):
        for one in containers(pod):
            yield f"{name}: {one['name']}", {e["name"]: e.get("value") for e in one["env"]}
    yield "template", gpu_template()["variables"]["properties"]["env"]["default"]


# Formats


def check_schema(*arguments: str) -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_compose_files_follow_the_specification(name: str) -> None:
    check_schema("--builtin-schema", "vendor.compose-spec", str(DEPLOYMENT / name))


def test_the_compose_schema_would_refuse(tmp_path: Path) -> None:
    bad = tmp_path / "compose.yaml"
    bad.write_text(COMPOSE.read_text().replace("interval: 10s", "intervall: 10s", 1))
    with pytest.raises(AssertionError, match="intervall"):
        check_schema("--builtin-schema", "vendor.compose-spec", str(bad))


@needs_kubectl
@pytest.mark.parametrize("folder", ["base", "standalone"])
def test_the_manifests_are_kubernetes(folder: str) -> None:
    resources = kustomized(folder)
    assert {"Deployment", "NetworkPolicy", "Role", "PersistentVolumeClaim"} <= {
        one["kind"] for one in resources
    }
    for one in resources:
        kubernetes_validate.validate(one, "1.31", strict=True)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "posttrain"


def test_each_file_of_manifests_by_itself() -> None:
    for one in manifests():
        kubernetes_validate.validate(one, "1.31", strict=True)


def test_the_dockerfile_has_nothing_to_complain_of() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint has no wheel for this machine")
    done = subprocess.run([hadolint, DEPLOYMENT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# The image


def stages() -> dict[str, list[dict[str, Any]]]:
    """The instructions of each stage of the Dockerfile, by its name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in DockerfileParser(path=str(DEPLOYMENT / "Dockerfile")).structure:
        if one["instruction"] == "FROM":
            found[one["value"].split(" AS ")[1]] = []
        elif one["instruction"] != "COMMENT":
            list(found.values())[-1].append(one)
    return found


def test_the_images_run_as_nobody_of_importance() -> None:
    runtime = [one for one in stages()["runtime"] if one["instruction"] == "USER"]
    assert [one["value"] for one in runtime] == ["10001:10001"]
    for name in ("services", "posttrain"):
        assert not [one for one in stages()[name] if one["instruction"] in ("USER", "RUN")]


def test_everything_is_installed_in_the_versions_that_were_tested() -> None:
    installs = [
        one["value"]
        for stage in stages().values()
        for one in stage
        if one["instruction"] == "RUN" and "pip install" in one["value"]
    ]
    assert len(installs) == 3
    assert all("--constraint infra/constraints.txt" in one for one in installs)
    constraints = (REPOSITORY / "infra" / "constraints.txt").read_text().lower()
    for package in ("torch", "prefect", "mlflow", "boto3", "psycopg2-binary", "prefect-kubernetes"):
        assert re.search(rf"^{package}==", constraints, re.MULTILINE), package


def test_the_extras_of_the_image_exist() -> None:
    (install,) = (one["value"] for one in stages()["posttrain-builder"] if "'.[" in one["value"])
    extras = re.search(r"\[(.*)\]", install)
    assert extras
    assert set(extras[1].split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_only_what_is_copied_is_sent_to_the_builder(tmp_path: Path) -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for name in (".env", "flows/.env.local", "schemas/__pycache__/x.pyc", "infra/deployment/.env"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert not {one for one in exclude_paths(str(tmp_path), patterns) if (tmp_path / one).is_file()}
    sent = exclude_paths(str(REPOSITORY), patterns, dockerfile="infra/deployment/Dockerfile")
    copied = {
        source
        for stage in stages().values()
        for one in stage
        if one["instruction"] == "COPY" and "--from" not in one["value"]
        for source in one["value"].split()[:-1]
    }
    assert copied <= sent
    top = {Path(one).parts[0] for one in sent}
    assert top == {Path(one).parts[0] for one in copied} | {".dockerignore"}
    assert {one for one in sent if "deployment" in one} <= {"infra/deployment/Dockerfile"}


def test_a_wheel_holds_no_deployment_files() -> None:
    find = PROJECT["tool"]["setuptools"]["packages"]["find"]
    found = find_namespace_packages(str(REPOSITORY), find["exclude"], find["include"])
    assert {"flows", "infra", "schemas", "stages", "stages.rl"} <= set(found)
    assert not [one for one in found if "deployment" in one]


# Pinned, closed, and without secrets


def test_every_image_is_pinned() -> None:
    assert len(set(images())) >= 7
    for image in images():
        name, _, tag = image.partition(":")
        assert re.fullmatch(r"[\w./-]+", name)
        assert re.fullmatch(r"v?\d+\.\d+[\w.-]*", tag), image
        if name.startswith("posttrain"):
            assert tag in (VERSION, f"{VERSION}-cuda")
            assert f"-t {image} " in (DEPLOYMENT / "Dockerfile").read_text()


def test_a_port_is_published_on_this_machine_only() -> None:
    published = [port for one in SERVICES.values() for port in one.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert not [one for one in SERVICES.values() if one.get("network_mode") == "host"]
    kinds = [one["spec"] for one in manifests() if one["kind"] == "Service"]
    assert all(one.get("type", "ClusterIP") == "ClusterIP" for one in kinds)
    assert not [one for one in manifests() if one["kind"] == "Ingress"]


def test_a_secret_comes_from_outside() -> None:
    raw = yaml.safe_load(COMPOSE.read_text())["services"]
    secret = re.compile(r"PASSWORD|SECRET|AUTH|ACCESS_KEY|TOKEN")
    found = 0
    for service in raw.values():
        for name, value in service.get("environment", {}).items():
            if secret.search(name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name
                assert value[2:].partition(":")[0] in SECRETS
                found += 1
    assert found >= 10
    for _, pod in pods(manifests()):
        for container in containers(pod):
            for one in container["env"]:
                if secret.search(one["name"]) and "SECRET_NAME" not in one["name"]:
                    reference = one.get("valueFrom", {}).get("secretKeyRef")
                    assert reference or one["name"].endswith("_SECRET_KEY"), one
    assert not [one for one in manifests() if one["kind"] == "Secret"]
    assert "$(cat" not in COMPOSE.read_text()


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_missing_secret_is_named(name: str) -> None:
    rest = {key: value for key, value in SECRETS.items() if key != name}
    with pytest.raises(LookupError, match=name):
        compose(rest)


def test_passwords_are_on_no_command_line() -> None:
    for service in SERVICES.values():
        command = [*service.get("command", []), *service.get("healthcheck", {}).get("test", [])]
        assert not [one for one in command if any(value in one for value in SECRETS.values())]


def test_the_containers_are_shut() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert service["restart"], name
        assert service.get("read_only") or name in ("postgres", "object-store")
    template = gpu_template()["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    for name, pod in [*pods(manifests()), ("run", template)]:
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for one in containers(pod):
            assert one["securityContext"] == {**SHUT, "capabilities": {"drop": ["ALL"]}}, name
            assert "memory" in one["resources"]["limits"], name


def test_the_worker_may_make_jobs_and_no_more() -> None:
    (role,) = (one for one in manifests() if one["kind"] == "Role")
    written = {
        resource
        for rule in role["rules"]
        if not set(rule["verbs"]) <= {"get", "list", "watch"}
        for resource in rule["resources"]
    }
    assert written == {"jobs"}
    assert not [one for one in manifests() if one["kind"].startswith("ClusterRole")]
    without = {
        one["metadata"]["name"]
        for one in manifests()
        if one["kind"] == "ServiceAccount" and one.get("automountServiceAccountToken") is False
    }
    assert without == {"run", "server"}


# True to the code and to each other


def test_every_variable_is_read_by_somebody() -> None:
    prefect = _get_valid_setting_names(Settings) | KUBERNETES_WORKER_SETTINGS
    own = {
        name
        for package in ("flows", "stages", "schemas", "infra")
        for path in (REPOSITORY / package).rglob("*.py")
        for name in re.findall(r"\"(POSTTRAIN_[A-Z_]+)\"", path.read_text())
    }
    assert "POSTTRAIN_HOME" in own
    scripts = (KUBERNETES / "standalone" / "initialise-postgres.sh").read_text()
    scripts += (DEPLOYMENT / "create_bucket.py").read_text()
    commands = " ".join(
        part
        for _, pod in pods(manifests())
        for one in containers(pod)
        for part in one.get("command", [])
    )
    for place, variables in environments():
        for name in variables:
            known = (
                name in prefect
                or name in own
                or name in OTHERS
                or hasattr(mlflow.environment_variables, name)
                or re.search(rf"\b{name}\b", scripts)
                or f"$({name})" in commands
            )
            assert known, f"{place}: nothing reads {name}"


def test_the_settings_of_the_kubernetes_worker() -> None:
    settings = pytest.importorskip("prefect_kubernetes.settings", reason="posttrain[kubernetes]")
    known = _get_valid_setting_names(settings.KubernetesSettings)
    assert known >= KUBERNETES_WORKER_SETTINGS


def test_addresses_and_ports_agree() -> None:
    """Whoever is spoken of by name is a service, listens there, and shares a network."""
    ports = {"postgres": 5432, "object-store": 8333, "mlflow": 5000, "prefect": 4200}
    address = re.compile(r"(?:@|//)(postgres|object-store|mlflow|prefect):(\d+)\b")
    spoken = 0
    for name, service in SERVICES.items():
        texts = [*service.get("command", []), *map(str, service.get("environment", {}).values())]
        for host, port in (found for text in texts for found in address.findall(text)):
            assert int(port) == ports[host], name
            assert set(service["networks"]) & set(SERVICES[host]["networks"]), (name, host)
            spoken += 1
    assert spoken >= 6
    prefect = SERVICES["prefect"]["environment"]
    assert prefect["PREFECT_SERVER_DATABASE_HOST"] in SERVICES
    assert int(prefect["PREFECT_SERVER_DATABASE_PORT"]) == ports["postgres"]
    assert int(prefect["PREFECT_SERVER_API_PORT"]) == ports["prefect"]
    services = {one["metadata"]["name"]: one for one in manifests() if one["kind"] == "Service"}
    assert services.keys() == {"postgres", "mlflow", "prefect"}
    for name, one in services.items():
        (port,) = one["spec"]["ports"]
        (pod,) = (pod for workload, pod in pods(manifests()) if workload == name)
        (listening,) = pod["containers"][0]["ports"]
        assert (port["port"], listening["containerPort"]) == (ports[name], ports[name])
        assert port["targetPort"] == listening["name"]


def test_the_object_store_is_out_of_reach_of_the_worker() -> None:
    near = {name for name, one in SERVICES.items() if "objects" in one["networks"]}
    assert near == {"object-store", "create-bucket", "mlflow"}
    assert {name for name, one in SERVICES.items() if "database" in one["networks"]} == {
        *("postgres", "mlflow", "prefect")
    }


def test_compose_and_kubernetes_set_the_servers_up_alike() -> None:
    differ = {"MLFLOW_S3_ENDPOINT_URL", "AWS_DEFAULT_REGION", "PREFECT_SERVER_DATABASE_HOST"}
    for name in ("prefect", "mlflow"):
        (pod,) = (pod for workload, pod in pods(manifests()) if workload == name)
        (container,) = pod["containers"]
        there = {one["name"]: one.get("value") for one in container["env"]}
        for key, value in SERVICES[name]["environment"].items():
            assert key in there, key
            if there[key] is not None:
                assert there[key] == value, key
            else:
                assert value in SECRETS.values() or key in differ | {"PREFECT_SERVER_DATABASE_PORT"}
        same = [one for one in SERVICES[name]["command"] if "://" not in one]
        assert [one for one in container["command"] if "$(" not in one] == same


@needs_kubectl
def test_a_network_policy_names_pods_that_exist() -> None:
    resources = kustomized("standalone")
    roles = {
        one["spec"]["template"]["metadata"]["labels"]["posttrain/role"]
        for one in resources
        if one["kind"] in ("Deployment", "StatefulSet")
    }
    template = gpu_template()["job_configuration"]["job_manifest"]["spec"]["template"]
    roles.add(template["metadata"]["labels"]["posttrain/role"])
    assert roles == {"prefect", "mlflow", "worker", "run", "postgres"}
    for one in resources:
        if one["kind"] == "NetworkPolicy":
            text = yaml.safe_dump(one["spec"])
            assert set(re.findall(r"posttrain/role: (\w+)", text)) <= roles
            assert set(re.findall(r"^ *- (\w+)$", text, re.M)) - {"Ingress", "Egress"} <= roles


@needs_kubectl
def test_every_reference_inside_the_manifests_is_kept() -> None:
    resources = kustomized("standalone")
    names = {(one["kind"], one["metadata"]["name"]) for one in resources}
    keys = {
        one["metadata"]["name"]: set(one["data"]) for one in resources if one["kind"] == "ConfigMap"
    }
    for name, pod in pods(resources):
        assert ("ServiceAccount", pod["serviceAccountName"]) in names, name
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in names, name
            if "configMap" in volume:
                assert volume["configMap"]["name"] in keys, name
        for one in containers(pod):
            for mount in one["volumeMounts"]:
                assert mount["name"] in volumes or mount["name"] == "data", (name, mount)
            for variable in one["env"]:
                reference = variable.get("valueFrom", {}).get("configMapKeyRef")
                assert reference is None or reference["key"] in keys[reference["name"]]


@needs_kubectl
def test_the_standalone_overlay_changes_the_addresses_that_are_read() -> None:
    base, whole = (
        next(
            one["data"]
            for one in kustomized(folder)
            if one["kind"] == "ConfigMap" and one["metadata"]["name"].startswith("addresses")
        )
        for folder in ("base", "standalone")
    )
    assert base.keys() == whole.keys()
    assert {name for name in base if base[name] != whole[name]} == {"artifacts"}
    (mlflow_pod,) = (pod for name, pod in pods(kustomized("standalone")) if name == "mlflow")
    (server,) = mlflow_pod["containers"]
    assert whole["artifacts"] in {one["mountPath"] for one in server["volumeMounts"]}
    services = {one["metadata"]["name"] for one in manifests() if one["kind"] == "Service"}
    assert whole["database-host"] in services


# The GPU pool's base job template


def defaults(template: dict[str, Any]) -> dict[str, Any]:
    variables = template["variables"]["properties"]
    return {name: one["default"] for name, one in variables.items() if "default" in one}


def job(**values: Any) -> dict[str, Any]:
    """The job that the template makes, filled in by Prefect's own templating."""
    template = gpu_template()
    filled = {**defaults(template), "name": "run", "labels": {}, "command": "true", **values}
    manifest: dict[str, Any] = apply_values(template["job_configuration"], filled)["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # What the worker does with them: a list of variables, and a split command.
    container["env"] = [{"name": key, "value": one} for key, one in container["env"].items()]
    container["args"] = container["args"].split()
    # The worker insists on these two here, where Kubernetes knows them not and drops them.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    return manifest


def test_every_placeholder_is_a_variable_with_a_description() -> None:
    template = gpu_template()
    variables = template["variables"]["properties"]
    used = {one.name for one in find_placeholders(template["job_configuration"])}
    assert used == set(variables)
    jsonschema.Draft202012Validator.check_schema(template["variables"])
    jsonschema.validate(defaults(template), template["variables"])
    for name, one in variables.items():
        assert one["title"] and one["description"] and one["type"], name


def test_the_job_is_one_of_kubernetes() -> None:
    kubernetes_validate.validate(job(), "1.31", strict=True)


def test_the_job_asks_for_gpus_and_time_to_leave() -> None:
    made = job(gpus=4, node_selector={"gpu": "h100"}, termination_grace_period_seconds=300)
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert job()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    # Prefect retries; Kubernetes would start a second copy of the run.
    assert made["spec"]["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    # The image's entry point is `posttrain`; the worker's command is another program.
    assert (container["command"], container["args"]) == (["/usr/bin/env"], ["true"])


@pytest.mark.parametrize("field", [{"termination_grace_period_seconds": 5}, {"gpus": 0}])
def test_a_form_that_asks_for_too_little_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="less than the minimum"):
        jsonschema.validate(field, gpu_template()["variables"])


def test_a_run_finds_what_the_worker_has() -> None:
    """A deployment made in the worker's pod runs in the job's: same places, same servers."""
    (worker,) = (pod for name, pod in pods(manifests()) if name == "worker")
    (there,) = worker["containers"]
    (here,) = job()["spec"]["template"]["spec"]["containers"]
    assert here["workingDir"] == there["workingDir"]
    mounts = {one["name"]: one["mountPath"] for one in there["volumeMounts"]}
    assert {"name": "posttrain", "mountPath": mounts["posttrain"]} in here["volumeMounts"]
    set_there = {one["name"]: one.get("value") for one in there["env"]}
    set_here = {one["name"]: one["value"] for one in here["env"]}
    shared = set_there.keys() & set_here.keys()
    assert {"POSTTRAIN_HOME", "MLFLOW_TRACKING_URI"} <= shared
    assert {key: set_there[key] for key in shared} == {key: set_here[key] for key in shared}
    claims = {one["metadata"]["name"] for one in manifests() if "Claim" in one["kind"]}
    assert defaults(gpu_template())["claim_name"] in claims
    accounts = {one["metadata"]["name"] for one in manifests() if one["kind"] == "ServiceAccount"}
    assert defaults(gpu_template())["service_account_name"] in accounts


def test_the_worker_takes_the_template() -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="posttrain[kubernetes]")
    # A client is asked for blocks and variables that a template refers to; here are none.
    nobody: Any = object()
    configuration = asyncio.run(
        worker.KubernetesWorkerJobConfiguration.from_template_and_values(
            gpu_template(), {"gpus": 2, "env": {"MORE": "1"}}, client=nobody
        )
    )
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="tonight"))
    template = configuration.job_manifest["spec"]["template"]
    assert template["metadata"]["labels"]["posttrain/role"] == "run"
    pod = template["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["MORE"] == "1"
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    # A pod that is driven from its node is not lost: the run is scheduled again.
    assert variables["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    del pod["parallelism"], pod["completions"]
    kubernetes_validate.validate(configuration.job_manifest, "1.31", strict=True)


def test_the_file_is_where_the_worker_reads_it() -> None:
    (worker,) = (pod for name, pod in pods(manifests()) if name == "worker")
    (option,) = (one for one in worker["initContainers"][0]["command"] if "template" in one)
    mounts = {one["name"]: one["mountPath"] for one in worker["initContainers"][0]["volumeMounts"]}
    assert option == f"--base-job-template={mounts['pool']}/{GPU_TEMPLATE.name}"


# The tests' own reader


def test_interpolation() -> None:
    assert interpolate({"a": ["${X:-1}", "${Y:?no}"]}, {"Y": "2"}) == {"a": ["1", "2"]}
    with pytest.raises(LookupError, match="Y: no"):
        interpolate("${Y:?no}", {"Y": ""})

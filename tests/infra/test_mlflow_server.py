"""The same promises against a real server over HTTP, which dies in the middle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.mlflow_tracking import MetricsShipper, Tracking
from infra.registry import Registry
from infra.store import Store
from infra.tracking import FileTracker
from schemas.artifacts import CreatedBy, ModelContract, PolicyCheckpoint

pytestmark = pytest.mark.slow


class Server:
    """An MLflow server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.start()

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                    *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                ],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        server = Server(tmp_path_factory.mktemp("server"))
        yield server
        server.kill()


def test_metrics_survive_the_death_of_the_server(server: Server, tmp_path: Path) -> None:
    tracking = Tracking(server.uri)
    run_id = tracking.open_pipeline_run("demo", "night", {"posttrain.run": "r1"})
    assert tracking.open_pipeline_run("demo", "night", {"posttrain.run": "r1"}) == run_id
    stage_run = tracking.open_stage_run(run_id, "train_sft", "f1", {"lr": 0.1})
    tracker = FileTracker(tmp_path / "metrics.jsonl")
    with MetricsShipper(tracking, stage_run, tracker.path, tmp_path / "cursor.json") as shipper:
        tracker.log_metrics({"pass@1": 0.1}, 1)
        time.sleep(1.5)
        server.kill()
        for step in (2, 3):
            tracker.log_metrics({"pass@1": step / 10}, step)
        time.sleep(1.5)
        server.start()
        tracker.log_metrics({"pass@1": 0.4}, 4)
        assert shipper.close(drain_timeout=60)
    history = tracking.client.get_metric_history(stage_run, "pass_at_1")
    assert [(metric.step, metric.value) for metric in history] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
    ]


def test_the_registry_by_server(server: Server, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    sha256 = store.seal(folder)
    artifact = PolicyCheckpoint(
        uri=store.content_uri(sha256),
        sha256=sha256,
        fingerprint=sha256,
        created_by=CreatedBy(posttrain="0", python="3", packages={}, code={}),
        algorithm="dpo",
        contract=ModelContract(
            tokenizer_sha256="0",
            chat_template_sha256=None,
            pad_token_id=0,
            eos_token_ids=(1,),
            architecture="LlamaForCausalLM",
            vocab_size=32,
            max_positions=32,
            dtype="float32",
        ),
        num_parameters=1,
        num_steps=1,
    )
    tracking = Tracking(server.uri)
    run_id = tracking.open_pipeline_run("demo", "other night", {"posttrain.run": "r2"})
    registry = Registry(server.uri, tmp_path / "locks")
    assert registry.champion("policy") is None
    assert registry.register("policy", artifact, folder, run_id, {}) == "1"
    assert registry.register("policy", artifact, folder, run_id, {}) == "1"
    registry.promote("policy", "1")
    champion = registry.champion("policy")
    assert champion is not None
    assert (champion.version, champion.sha256) == ("1", sha256)
    assert registry.list_models() == [champion]
    assert store.seal(registry.download("policy", "champion", tmp_path / "out")) == sha256

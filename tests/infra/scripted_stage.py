"""Stands in for `stages.main`: does what the request's generator is named after."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from infra.heartbeat import HeartbeatWriter
from infra.launch import die_with_parent, write_result
from infra.store import Store
from schemas.artifacts import CreatedBy, DatasetArtifact
from schemas.requests import PrepareDataRequest


def main() -> None:
    die_with_parent()
    work = Path(sys.argv[1])
    request = PrepareDataRequest.model_validate_json((work / "request.json").read_bytes())
    assert request.source.generator is not None
    behaviour = request.source.generator.removeprefix("scripted:")
    (work / "pid").write_text(str(os.getpid()))
    print(f"hello from {behaviour}", flush=True)
    globals()[behaviour](work, request)


def done(work: Path, request: PrepareDataRequest) -> None:
    store = Store(request.runtime.store)
    content = work / "content"
    content.mkdir(exist_ok=True)
    (content / "records.jsonl").write_text("{}\n")
    artifact = DatasetArtifact(
        uri=store.content_uri(request.fingerprint),
        sha256=store.seal(content),
        fingerprint=request.fingerprint,
        created_by=CreatedBy(posttrain="0", python="3", packages={}, code={}),
        split="prompts",
        layout="verifiable",
        num_records=1,
        num_prompts=1,
    )
    store.publish(request.fingerprint, artifact)
    print("a grüner line")
    print("no newline at the end", end="")
    write_result(work, "done", resumed_from_step=7)


def done_without_artifact(work: Path, request: PrepareDataRequest) -> None:
    write_result(work, "done")


def user_error(work: Path, request: PrepareDataRequest) -> None:
    write_result(work, "user_error", "records.jsonl line 3: no field prompt; add it")
    sys.exit(2)


def memory_error(work: Path, request: PrepareDataRequest) -> None:
    write_result(work, "failed", "MemoryError", retryable=True)
    sys.exit(1)


def bug(work: Path, request: PrepareDataRequest) -> None:
    raise KeyError("a bug of ours")


def temporary(work: Path, request: PrepareDataRequest) -> None:
    sys.exit(75)


def killed(work: Path, request: PrepareDataRequest) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (work / "grandchild").write_text(str(sleeper.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def checkpoints_on_sigterm(work: Path, request: PrepareDataRequest) -> None:
    def leave(*_: object) -> None:
        (work / "checkpoint").write_text("step 5")
        write_result(work, "terminated", "stopped after step 5")
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)
    print("ready", flush=True)
    time.sleep(60)


def ignores_sigterm(work: Path, request: PrepareDataRequest) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(60)


def hangs_for_good(work: Path, request: PrepareDataRequest) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    writer = HeartbeatWriter(work)
    for step in range(3):
        writer.beat(f"training on step {step + 1}")
    time.sleep(120)


main()

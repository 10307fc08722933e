"""Records, manifests, artifacts, requests, results, metrics, checkpoints and run records."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flows.display import print_run, runs_table
from flows.runs import RunRecord, Runs
from infra.delivery import deliver
from infra.files import file_digest
from infra.launch import _read_result, write_result
from infra.manifest import CorruptArtifact, build_manifest, check_sizes, parse_manifest
from infra.outbox import OpenPipelineRun, Outbox, Tags
from infra.run_tracking import RunTracking
from infra.store import Store
from infra.tracking import FileTracker, MetricsLine, format_line
from schemas.artifacts import CreatedBy, DatasetArtifact, artifact_adapter
from schemas.base import UserError
from schemas.fingerprint import canonical_json
from schemas.requests import PrepareDataRequest
from schemas.training import OptimizerConfig
from stages import prepare_data
from stages.checkpoint import Checkpoints
from stages.data.layouts import validate_record
from stages.data.raw import RawRecord
from stages.main import read_request
from stages.optimization import Optimizer

sys.path.insert(0, str(Path(__file__).parent))  # the strategies beside this file
from strategies import JSON, TEXT, WORDS, broken, changed, dump, files

FUZZ = settings.get_profile("fuzz")
MESSAGES = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
REJECTED = [{"role": "assistant", "content": "3"}]
GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES},
    "prompt_completion": {"prompt": "1+1=", "completion": "2"},
    "preference": {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": REJECTED},
    "steps": {"prompt": "1+1+1=", "completions": ["1+1=2", "2+1=3"], "labels": [True, False]},
    "verifiable": {"prompt": "1+1=", "answer": "2", "metadata": {"a": [{"b": None}]}},
}
LINES = [dump(record) for record in GOOD.values()]
CREATED = CreatedBy(posttrain="0", python="3", packages={}, code={})
FINGERPRINT = "f" * 64


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def contents(suffix: str, layout: str) -> st.SearchStrategy[bytes]:
    """Files of a kind: of good records, made bad or not, or of anything else."""
    record = GOOD[layout]
    line = dump(record)
    if suffix == ".parquet":
        good = parquet([record] * 3)
        return st.one_of(st.just(good), broken(good), broken(good), st.binary(max_size=80))
    if suffix == ".json":
        return files([b"[" + line + b"," + line + b"]"])
    lines = st.lists(st.sampled_from([line, line + b"\r", b"", b" "]), min_size=1, max_size=3)
    return st.one_of(files([line]), lines.map(b"\n".join))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Silent:
    def log_metrics(self, metrics: Any, step: int) -> None: ...

    def rewind(self, step: int) -> None: ...


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@FUZZ
@given(data=st.data())
def test_files_of_records(folder: Path, judge: Any, suffix: str, data: st.DataObject) -> None:
    layout: Any = data.draw(st.sampled_from(sorted(GOOD)))
    content = data.draw(contents(suffix, layout))
    work = fresh(folder / "records")
    (work / f"data{suffix}").write_bytes(content)
    request = PrepareDataRequest.model_validate(
        {
            "fingerprint": FINGERPRINT,
            "runtime": {"store": str(work / "store"), "data_root": str(work)},
            "split": "evaluation",
            "layout": layout,
            "source": {"path": f"data{suffix}"},
        }
    )
    store = Store(work / "store")
    run_dir = store.work_dir(FINGERPRINT)

    def prepare() -> DatasetArtifact:
        return prepare_data.run(request, run_dir=run_dir, tracker=Silent())

    artifact = judge(f"records: {suffix}", prepare)
    if artifact is None:
        assert not store.artifacts_folder.exists()  # nothing that a later stage could read
        return
    store.publish(FINGERPRINT, artifact)
    assert store.find_verified(FINGERPRINT) == artifact


@pytest.mark.parametrize("layout", GOOD)
@FUZZ
@given(data=st.data())
def test_values_of_records(judge: Any, layout: Any, data: st.DataObject) -> None:
    value = data.draw(changed(GOOD[layout]))
    if not isinstance(value, dict):
        value = {"prompt": value}

    def check() -> str:
        record = validate_record(RawRecord("a.jsonl line 1", value), layout)
        return canonical_json(record.model_dump(mode="json"))

    text = judge(f"record: {layout}", check)
    if text is not None:
        text.encode()
        assert canonical_json(json.loads(text)) == text


MANIFEST = {
    name: {"sha256": "0" * 64, "size": 1} for name in ("a.json", "b/c.safetensors", "records.jsonl")
}
NAMES = st.one_of(
    TEXT,
    WORDS,
    st.lists(st.sampled_from(["..", ".", "", "/", "\\", "a", "C:", "\0", "\ud800"])).map("/".join),
)


@FUZZ
@given(
    text=st.one_of(
        files([dump(MANIFEST)]),
        changed(MANIFEST).map(dump),
        st.dictionaries(NAMES, st.just({"sha256": "0" * 64, "size": 0}), max_size=3).map(dump),
    )
)
def test_manifests(folder: Path, judge: Any, text: bytes) -> None:
    content = folder / "manifest" / "content"
    content.mkdir(parents=True, exist_ok=True)

    def read() -> list[str]:
        try:
            manifest = parse_manifest(text)
            for name in manifest:
                place = (content / name).resolve()
                assert content.resolve() in place.parents
                assert place.relative_to(content.resolve()).as_posix() == name
            check_sizes(content, manifest)
        except CorruptArtifact as error:
            raise UserError(str(error)) from error
        return list(manifest)

    judge("manifest", read)


def artifact(content: Path, store: Store) -> DatasetArtifact:
    return DatasetArtifact(
        uri=store.content_uri(FINGERPRINT),
        sha256=store.seal(content),
        fingerprint=FINGERPRINT,
        created_by=CREATED,
        split="prompts",
        layout="verifiable",
        num_records=1,
        num_prompts=1,
    )


@FUZZ
@given(data=st.data())
def test_a_damaged_artifact_is_never_handed_out(
    folder: Path, judge: Any, data: st.DataObject
) -> None:
    store = Store(fresh(folder / "store"))
    content = store.work_dir(FINGERPRINT) / "content"
    content.mkdir()
    (content / "records.jsonl").write_bytes(LINES[4])
    good = artifact(content, store)
    store.publish(FINGERPRINT, good)
    name = data.draw(st.sampled_from(["artifact.json", "manifest.json", "content/records.jsonl"]))
    path = store.artifacts_folder / FINGERPRINT / name
    before = path.read_bytes()
    after = data.draw(st.one_of(broken(before), changed_json(before)))
    path.write_bytes(after)

    def find() -> DatasetArtifact:
        found = store.find_verified(FINGERPRINT)
        if found is None:
            assert not (store.artifacts_folder / FINGERPRINT).exists()
            raise UserError("in quarantine")
        assert store.path(found) == store.artifacts_folder / FINGERPRINT / "content"
        assert build_manifest(store.path(found)) == json.loads(
            (store.artifacts_folder / FINGERPRINT / "manifest.json").read_bytes()
        )
        return found

    judge("artifact", find)


def changed_json(good: bytes) -> st.SearchStrategy[bytes]:
    return changed(json.loads(good)).map(dump)


REQUEST = {
    "fingerprint": FINGERPRINT,
    "runtime": {"store": "/s", "data_root": "."},
    "stage": "prepare_data",
    "split": "prompts",
    "layout": "verifiable",
    "source": {"path": "a.jsonl"},
    "sources": {},
}


@FUZZ
@given(text=st.one_of(files([dump(REQUEST)]), changed(REQUEST).map(dump)))
def test_requests(folder: Path, judge: Any, text: bytes) -> None:
    (folder / "request.json").write_bytes(text)
    judge("request.json", read_request, folder / "request.json")


@FUZZ
@given(text=files([b'{"status":"done","message":"","retryable":false,"resumed_from_step":3}']))
def test_results(folder: Path, judge: Any, text: bytes) -> None:
    (folder / "result.json").write_bytes(text)
    judge("result.json", _read_result, folder)


@FUZZ
@given(message=TEXT)
def test_any_message_of_a_stage_comes_back(folder: Path, judge: Any, message: str) -> None:
    (folder / "out").mkdir(exist_ok=True)

    def there_and_back() -> Any:
        write_result(folder / "out", "failed", message)
        return _read_result(folder / "out")

    found = judge("result.json: message", there_and_back)
    assert found is not None and found.status == "failed"


class Server:
    """Takes what it is told, as MLflow does."""

    uri = "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.tags: list[dict[str, str]] = []

    def open_pipeline_run(self, experiment: str, name: str, tags: Any, started: float) -> str:
        return "id"

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        self.tags.append(tags)

    def log_lines(self, run_id: str, lines: Any) -> None:
        for line in lines:
            assert isinstance(line.step, int)


METRICS = format_line(MetricsLine(3, {"loss": 0.5, "kl": float("nan")}, 1.7e9)).encode()
DELIVERED = b'{"server":"0","offset":10,"runs":{"pipeline":"id"},"creating":null,"doubtful":[]}'
OPERATIONS = [
    OpenPipelineRun(experiment="e", name="n", tags={}, time=1.0).model_dump_json().encode(),
    Tags(run="pipeline", tags={"a": "b"}).model_dump_json().encode(),
]


@FUZZ
@given(
    text=files([METRICS.strip(), METRICS + METRICS]),
    step=st.integers(0, 9),
)
def test_metrics(folder: Path, judge: Any, text: bytes, step: int) -> None:
    path = fresh(folder / "metrics") / "metrics.jsonl"
    path.write_bytes(text)

    def resume() -> None:
        tracker = FileTracker(path)
        tracker.log_metrics({"loss": 1.0}, step=step)
        tracker.rewind(step)
        tracker.log_metrics({"loss": 2.0}, step=step + 1)

    judge("metrics.jsonl", resume)
    assert path.read_bytes().endswith(b"\n")
    tracking = RunTracking(Outbox(path.parent / "outbox"), Server.uri)

    def take_up() -> None:
        with tracking.metrics_of("stage", path):
            pass

    judge("metrics.jsonl: outbox", take_up)


@FUZZ
@given(
    operations=files([b"\n".join(OPERATIONS), OPERATIONS[0]]),
    state=st.one_of(files([DELIVERED]), changed(json.loads(DELIVERED)).map(dump)),
)
def test_an_outbox(folder: Path, judge: Any, operations: bytes, state: bytes) -> None:
    """Whatever its files hold, what is said after it is delivered."""
    outbox = Outbox(fresh(folder / "outbox"))
    outbox.path.write_bytes(operations)
    (outbox.folder / "delivered.json").write_bytes(state)
    last = Tags(run="pipeline", tags={"last": "word"})
    outbox.append(OpenPipelineRun(experiment="e", name="n", tags={}, time=1.0), last)
    server = Server()
    judge("outbox", deliver, outbox, server)
    assert server.tags[-1] == last.tags


RECORD = RunRecord(
    run="r",
    recipe="r",
    seed=0,
    store="/s",
    config_digest="0",
    status="finished",
    started=datetime(2026, 1, 1, tzinfo=UTC),
    stages=(
        {  # type: ignore[arg-type]
            "name": "credit",
            "status": "ran",
            "seconds": 1.0,
            "peak_memory_bytes": 1,
            "fingerprint": FINGERPRINT,
            "artifact": "artifacts/x/content",
        },
    ),
    evaluation={
        name: {"pass@1": 0.5, "num_records": 1, "kl": 0.1, "length": 2.0, "truncated_fraction": 0.0}
        for name in ("candidate", "baseline", "incumbent")
    },
    reward_models={"outcome": {"accuracy": 0.5}, "process": None},
    decision={
        "promoted": True,
        "registered_model": "r",
        "version": "1",
        "aliases": ["champion"],
        "reasons": ["better"],
    },
)
RECORD_JSON = RECORD.model_dump_json().encode()


@FUZZ
@given(text=st.one_of(files([RECORD_JSON]), changed_json(RECORD_JSON)))
def test_run_records(folder: Path, judge: Any, text: bytes) -> None:
    store = folder / "runs-store"
    path = store / "runs" / "r" / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)

    def show() -> int:
        records = Runs(store).all()
        console = Console(file=io.StringIO(), width=100)
        console.print(runs_table(records))
        for record in records:
            print_run(console, record)
            record.document()
        return len(records)

    judge("run.json", show)


@FUZZ
@given(value=st.one_of(JSON, changed(json.loads(RECORD_JSON))))
def test_artifact_documents(judge: Any, value: Any) -> None:
    def read() -> Any:
        try:
            return artifact_adapter.validate_json(dump(value))
        except ValueError as error:
            raise UserError(str(error)[:1000]) from error

    judge("artifact: document", read)


@FUZZ
@given(data=st.data())
def test_checkpoints(folder: Path, judge: Any, data: st.DataObject) -> None:
    place = fresh(folder / "checkpoints")
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = Optimizer.create(model, OptimizerConfig(learning_rate=0.1), 10)
    checkpoints = Checkpoints(place, {"model": model}, {"model": optimizer})
    torch.nn.init.constant_(model.weight, 1.0)
    checkpoints.save(1, {"position": 1})
    torch.nn.init.constant_(model.weight, 2.0)
    checkpoints.save(2, {"position": 2})
    newest = place / "step-00000002"
    names = sorted(path.name for path in newest.iterdir())
    path = newest / data.draw(st.sampled_from(names))
    before = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(data.draw(st.one_of(broken(before), changed_json(before))))
    else:
        path.write_bytes(data.draw(broken(before)))
    if data.draw(st.booleans()) and path.name != "manifest.json":
        files_there = [one for one in newest.iterdir() if one.name != "manifest.json"]
        digests = {one.name: file_digest(one) for one in files_there}
        (newest / "manifest.json").write_text(json.dumps(digests))

    def resume() -> int:
        found = checkpoints.resume()
        assert found is not None  # at the latest, the one before
        if path.name != "model.safetensors" and path.name != "state.json":
            assert model.weight.item() == float(found.step)
        return found.step

    judge("checkpoint", resume)

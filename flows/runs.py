"""What is written down about a run: `runs/<run>/run.json` in the store."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from infra.files import encodable
from infra.outbox import Outbox
from infra.redaction import redact
from schemas.base import Frozen, UserError
from schemas.fingerprint import digest
from schemas.pipeline import PipelineConfig

StageStatus = Literal["ran", "reused", "resumed"]
RunStatus = Literal["running", "finished", "failed", "stopped"]


# What a person is shown must be there; more may be.
class _Scores(BaseModel):
    pass_at_1: float = Field(alias="pass@1")
    num_records: int
    kl: float
    length: float
    truncated_fraction: float


class _Evaluation(BaseModel):
    candidate: _Scores
    baseline: _Scores
    incumbent: _Scores


class _Decision(BaseModel):
    promoted: bool
    registered_model: str
    version: str
    aliases: list[str]
    reasons: list[str]


class _Outcome(BaseModel):
    accuracy: float


class _Process(BaseModel):
    step_accuracy: float
    first_error_f1: float


class _RewardModels(BaseModel):
    outcome: _Outcome | None
    process: _Process | None


def _shaped(shape: type[BaseModel]) -> AfterValidator:
    """Checks that a document holds what it is shown with, and leaves it as it is."""

    def check(value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            shape.model_validate(value)
        return value

    return AfterValidator(check)


class StageRow(Frozen):
    """One stage of a run."""

    name: str
    """Name of the stage; for `prepare_data` with its split."""
    status: StageStatus
    """`ran`, `reused`, or `resumed` from a checkpoint."""
    seconds: float
    """Wall time in this run; 0 for a reused stage."""
    peak_memory_bytes: int | None
    """Largest resident memory of the stage's process; None for a reused stage."""
    fingerprint: str
    """What the work was."""
    artifact: str
    """Folder of the artifact, relative to the store."""


class RunRecord(Frozen):
    """One run of a recipe."""

    run: str
    """Name of the run."""
    recipe: str
    """Name of the recipe."""
    seed: int
    """Seed of every stage."""
    store: str
    """Root folder of the store."""
    config_digest: str
    """Digest of everything that was configured, apart from where it runs."""
    status: RunStatus = "running"
    """How the run stands."""
    started: datetime
    """When it was started first."""
    ended: datetime | None = None
    """When it ended."""
    mlflow_run_id: str | None = None
    """The MLflow run of the pipeline."""
    stages: tuple[StageRow, ...] = ()
    """Stages that are done, in order."""
    evaluation: Annotated[dict[str, Any] | None, _shaped(_Evaluation)] = None
    """Scores of candidate, baseline and incumbent."""
    reward_models: Annotated[dict[str, Any], _shaped(_RewardModels)] = Field(
        default_factory=lambda: {"outcome": None, "process": None}
    )
    """Held-out numbers of the reward models; None where the recipe has none."""
    decision: Annotated[dict[str, Any] | None, _shaped(_Decision)] = None
    """What the gate said, and what the registry did."""
    outcome: str | None = None
    """One sentence on how it ended."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration."""

    def with_row(self, row: StageRow) -> RunRecord:
        """The record with a stage's row added, or replaced where the stage has one."""
        others = tuple(item for item in self.stages if item.name != row.name)
        return self.model_copy(update={"stages": (*others, row)})

    def document(self) -> dict[str, Any]:
        """What `posttrain run --json` prints."""
        return self.model_dump(
            mode="json",
            include={
                "run",
                "recipe",
                "seed",
                "store",
                "mlflow_run_id",
                "stages",
                "evaluation",
                "reward_models",
                "decision",
            },
        )


def config_digest(config: PipelineConfig) -> str:
    """Identity of what a run was asked to do; where it runs is left out."""
    content = config.model_dump(mode="json", exclude={"compute": True, "data": {"root"}})
    return digest(content)


def outbox_of(folder: Path) -> Outbox:
    """The outbox of a run, in its folder."""
    return Outbox(folder / "outbox")


class OpenRun:
    """A run that this process works on, and nobody else."""

    def __init__(self, record: RunRecord, folder: Path, reopened: bool) -> None:
        self.record = record
        self.folder = folder
        self.reopened = reopened
        self.outbox = outbox_of(folder)
        """What the run has to tell MLflow."""

    def update(self, **fields: Any) -> None:
        """Change fields of the record and write it."""
        self.write(self.record.model_copy(update=fields))

    def write(self, record: RunRecord) -> None:
        """Replace the record in memory and, by one rename, on disk; without secrets."""
        if record.outcome is not None:
            outcome = encodable(redact(record.outcome))
            record = record.model_copy(update={"outcome": outcome})
        self.record = record
        temporary = self.folder / f"run.json.{os.getpid()}"
        temporary.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.folder / "run.json")


class Runs:
    """The runs of a store."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.root = store / "runs"

    def all(self) -> list[RunRecord]:
        """Every run, the newest first; one whose process died is `stopped`."""
        records = [self._read(path.parent) for path in self.root.glob("*/run.json")]
        found = [record for record in records if record is not None]
        return sorted(found, key=lambda record: (record.started, record.run), reverse=True)

    def read(self, name: str) -> RunRecord:
        """A run by name; `latest` is the newest. Raises `UserError` where there is none."""
        records = self.all()
        if name == "latest" and records:
            return records[0]
        for record in records:
            if record.run == name:
                return record
        names = [record.run for record in records]
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(
            f"there is no run {name} in {self.store}; {hint}"
            + ("posttrain runs lists them" if names else "nothing has run there yet")
        )

    def latest_finished(self, digest: str) -> RunRecord | None:
        """The newest finished run of a configuration."""
        for record in self.all():
            if record.config_digest == digest and record.status == "finished":
                return record
        return None

    def note_mlflow_run(self, name: str, run_id: str | None) -> None:
        """Write down which MLflow run a run is that has ended; one at work writes it itself."""
        folder = self.root / name
        with _lock(folder) as held:
            record = self._read_file(folder)
            if held and record is not None and record.mlflow_run_id != run_id:
                OpenRun(record, folder, reopened=True).update(mlflow_run_id=run_id)

    def reader_of(self, fingerprint: str, *, but: str) -> str | None:
        """A run at work, other than `but`, that has an artifact among its stages."""
        for record in self.all():
            uses = any(row.fingerprint == fingerprint for row in record.stages)
            if uses and record.status == "running" and record.run != but:
                return record.run
        return None

    @contextlib.contextmanager
    def open(self, config: PipelineConfig) -> Iterator[OpenRun]:
        """The unfinished run of the same configuration, or a new one, held by this process.

        A run whose process is alive is left to it.
        """
        wanted = config_digest(config)
        for record in self.all():
            if record.config_digest != wanted or record.status in ("finished", "running"):
                continue
            folder = self.root / record.run
            with _lock(folder) as held:
                if held:
                    run = OpenRun(record, folder, reopened=True)
                    run.update(status="running", ended=None, outcome=None, stages=())
                    yield run
                    return
        folder = self._new_folder(config.name)
        with _lock(folder) as held:
            assert held, folder
            record = RunRecord(
                run=folder.name,
                recipe=config.name,
                seed=config.seed,
                store=str(self.store),
                config_digest=wanted,
                started=datetime.now(UTC),
                config=config.model_dump(mode="json"),
            )
            run = OpenRun(record, folder, reopened=False)
            run.write(record)
            yield run

    def _new_folder(self, recipe: str) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        stem = f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        number = 1
        while True:
            folder = self.root / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder

    def _read_file(self, folder: Path) -> RunRecord | None:
        try:
            return RunRecord.model_validate_json((folder / "run.json").read_bytes())
        except (OSError, ValidationError):
            return None  # written by another version, or being removed

    def _read(self, folder: Path) -> RunRecord | None:
        record = self._read_file(folder)
        if record is not None and record.status == "running":
            with _lock(folder, shared=True) as free:
                if free:
                    return record.model_copy(update={"status": "stopped"})
        return record


@contextlib.contextmanager
def _lock(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold a run's lock, which the system takes back from a dead process; False if it is taken.

    A shared lock is for looking whether a run is alive; it is held for an instant only, so the
    owner of a run tries a few times.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with (folder / "lock").open("a") as file:
        for _ in range(1 if shared else 5):
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                break
        else:
            yield False
            return
        yield True

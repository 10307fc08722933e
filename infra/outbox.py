"""What a run has to tell the tracking server, on disk until it is told.

One file of operations a run, in order. The run appends and never waits; whoever can reach the
server delivers, in order and once. An operation names runs by keys of the run's own, since MLflow
gives its run ids itself: which id a key has got is written down beside the operations.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from infra.files import disk_full_named, file_digest, sync, try_file_lock, write_atomic
from infra.tracking import format_line, parse_line
from schemas.base import Frozen

_log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

PIPELINE = "pipeline"
"""Key of the run of the whole pipeline; a stage's key is its fingerprint."""


class OpenPipelineRun(Frozen):
    """Make the pipeline's run, or open it again."""

    op: Literal["open_pipeline"] = "open_pipeline"
    run: str = PIPELINE
    experiment: str
    name: str
    tags: dict[str, str]
    time: float
    """Seconds since 1970, as everywhere here."""


class OpenStageRun(Frozen):
    """Make a stage's nested run, or open it again."""

    op: Literal["open_stage"] = "open_stage"
    run: str
    stage: str
    params: dict[str, str]
    time: float


class Tags(Frozen):
    """Set tags of a run, over old ones."""

    op: Literal["tags"] = "tags"
    run: str
    tags: dict[str, str]


class Lines(Frozen):
    """Log lines of a stage's metrics file, as they stand there."""

    op: Literal["lines"] = "lines"
    run: str
    lines: list[str]


class Document(Frozen):
    """Keep a small file with a run."""

    op: Literal["document"] = "document"
    run: str
    path: str
    """The outbox's own copy, relative to its folder."""


class Finish(Frozen):
    """Close a run; it can be opened again."""

    op: Literal["finish"] = "finish"
    run: str
    status: RunStatus
    time: float


Operation = Annotated[
    OpenPipelineRun | OpenStageRun | Tags | Lines | Document | Finish, Field(discriminator="op")
]
_operation: TypeAdapter[Any] = TypeAdapter(Operation)


class Delivered(Frozen):
    """How far an outbox has been delivered, and to whom."""

    server: str = ""
    """Digest of the server's address, which may hold a password."""
    offset: int = Field(default=0, ge=0)
    """Bytes of the operations that were delivered."""
    runs: dict[str, str] = Field(default_factory=dict)
    """MLflow's run id of each key."""
    creating: str | None = None
    """Key of a run that the server was asked to make, and nobody knows whether it has."""
    doubtful: tuple[str, ...] = ()
    """Keys of runs that were asked for more than once."""


class Outbox:
    """The operations of one run. Appended to by the run's process only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "operations.jsonl"
        self.rejected = folder / "rejected.jsonl"
        self._state = folder / "delivered.json"
        self._appending = threading.Lock()
        self._steps: dict[str, dict[str, int]] | None = None

    def identity(self) -> str:
        """A name for the run that no other run on any machine has; made on first use."""
        path = self.folder / "identity"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, uuid.uuid4().hex)
        return path.read_text(encoding="ascii")

    def append(self, *operations: Frozen) -> None:
        """Add operations, on disk before this returns; all of them or none."""
        data = b"".join(one.model_dump_json().encode() + b"\n" for one in operations)
        with self._appending:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._drop_torn_line()
            with disk_full_named(self.path), self.path.open("ab", buffering=0) as file:
                start = file.tell()
                try:
                    if file.write(data) != len(data):
                        raise OSError(f"{self.path}: a write was cut short")
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, start)
                    raise

    def append_lines(self, run: str, lines: list[str]) -> int:
        """Add lines of a metrics file, but for steps that a metric has had; returns their number.

        A stage that goes on from a checkpoint writes steps again: they are the same, and go once.
        """
        with self._appending:
            if self._steps is None:
                self._steps = self._read_steps()
            seen = dict(self._steps.get(run, {}))
        fresh: list[str] = []
        for text in lines:
            line = parse_line(text)
            new = [key for key in line.metrics if line.step > seen.get(key, -1)]
            if new:
                seen.update(dict.fromkeys(new, line.step))
                fresh.append(_only(text, new) if len(new) < len(line.metrics) else text)
        if fresh:
            self.append(Lines(run=run, lines=fresh))
            self._steps[run] = seen
        return len(fresh)

    def keep(self, path: Path) -> str:
        """Copy a file into the outbox, where it waits; its place relative to the folder."""
        place = Path("files") / file_digest(path) / path.name
        target = self.folder / place
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{uuid.uuid4().hex}")
            try:
                with disk_full_named(target):
                    shutil.copyfile(path, temporary)
                    sync(temporary)
                    temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            sync(target.parent)
        return str(place)

    def read(self, offset: int) -> Iterator[tuple[Any, int]]:
        """Every whole operation from an offset on, with the offset after it."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    operation = _operation.validate_json(line)
                except ValidationError:
                    _log.warning("%s: a damaged operation is left out", self.path)
                    continue
                yield operation, offset

    def is_unfinished(self, key: str) -> bool:
        """Whether a run was opened, and not closed as finished since."""
        found = False
        for operation, _ in self.read(0):
            if operation.run == key and isinstance(operation, OpenStageRun | Finish):
                found = not (isinstance(operation, Finish) and operation.status == "FINISHED")
        return found

    def size(self) -> int:
        """Bytes of the operations."""
        return self.path.stat().st_size if self.path.exists() else 0

    def delivered(self, uri: str) -> Delivered:
        """What the server at an address has been told; another server starts at the beginning."""
        server = hashlib.sha256(uri.encode()).hexdigest()
        if self._state.exists():
            try:
                state = Delivered.model_validate_json(self._state.read_bytes())
            except ValidationError:
                # Every operation can be told twice: runs are found again, equal values dropped.
                _log.warning("%s is damaged: MLflow is told everything again", self._state)
                return Delivered(server=server)
            if state.server == server:
                return state
        return Delivered(server=server)

    def note(self, state: Delivered) -> None:
        """Write down what has been delivered."""
        write_atomic(self._state, state.model_dump_json())

    def reject(self, operation: Frozen, reason: str) -> None:
        """Put an operation aside that the server will never take, so that the others go on."""
        with self.rejected.open("a", encoding="utf-8") as file:
            file.write(f"{reason}\n{operation.model_dump_json()}\n")

    def waiting(self, uri: str) -> int:
        """How many operations the server has not been told."""
        return sum(1 for _ in self.read(self.delivered(uri).offset))

    def delivering(self) -> contextlib.AbstractContextManager[bool]:
        """The right to deliver, and whether it was free: one process at a time has it."""
        return try_file_lock(self.folder / "delivery.lock")

    def forget(self) -> None:
        """Remove what has been delivered, of a run that will not be opened again."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "files", ignore_errors=True)
        self._state.unlink(missing_ok=True)

    def _read_steps(self) -> dict[str, dict[str, int]]:
        steps: dict[str, dict[str, int]] = {}
        for operation, _ in self.read(0):
            if isinstance(operation, Lines):
                seen = steps.setdefault(operation.run, {})
                for line in map(parse_line, operation.lines):
                    for key in line.metrics:
                        seen[key] = max(line.step, seen.get(key, -1))
        return steps

    def _drop_torn_line(self) -> None:
        """An operation without its end was cut by a kill, before anybody could read it."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def _only(text: str, keys: list[str]) -> str:
    """A line of metrics with some of its metrics."""
    line = parse_line(text)
    kept = {key: value for key, value in line.metrics.items() if key in keys}
    return format_line(line._replace(metrics=kept)).strip()

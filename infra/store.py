"""The store: finished artifacts by fingerprint, and the folders in which work happens.

`artifacts/<fingerprint>/` holds `artifact.json` and its digest, `manifest.json`, `content/` and,
where it is known, `identity.json`: what the fingerprint was made of. It appears by one rename, or
not at all.
`work/<fingerprint>/` is where a stage runs. Every path of the store is made in this file.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.files import (
    disk_full_named,
    file_digest,
    file_lock,
    sync,
    try_file_lock,
    write_atomic,
)
from infra.manifest import (
    CorruptArtifact,
    Manifest,
    build_manifest,
    check_content,
    check_sizes,
    manifest_digest,
    parse_manifest,
    plain_files,
)
from schemas.artifacts import AnyArtifact, Artifact, artifact_adapter
from schemas.fingerprint import canonical_json

_log = logging.getLogger(__name__)
_FINGERPRINT = re.compile(r"[A-Za-z0-9_-]+")
_IDENTITY = "identity.json"
_SEAL = "artifact.sha256"
"""Digest of `artifact.json`, which holds numbers that a promotion is decided on."""


class Store:
    """Artifacts and work folders below one root folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.artifacts_folder = self.root / "artifacts"
        self.work_folder = self.root / "work"
        self.runs_folder = self.root / "runs"
        self.quarantine_folder = self.root / "quarantine"
        self.trash_folder = self.root / "trash"
        self._verified: set[tuple[str, str]] = set()
        self._locks: dict[str, int] = {}

    def seal(self, content: Path) -> str:
        """The digest of a folder's manifest: what `Artifact.sha256` holds."""
        return manifest_digest(build_manifest(content))

    def content_uri(self, fingerprint: str) -> str:
        """Folder of an artifact's content, relative to the root."""
        return _uri(fingerprint)

    def work_dir(self, fingerprint: str) -> Path:
        """The folder in which the work of a fingerprint happens; made if it is missing."""
        folder = self.work_folder / _checked(fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def lock(self, fingerprint: str, on_wait: Callable[[str], None] = _log.info) -> Iterator[None]:
        """One writer per fingerprint. Waits, and says so once, while another holds it."""
        path = self._lock_path(fingerprint)
        message = f"another run is working on {fingerprint[:12]}; waiting"
        with file_lock(path, lambda: on_wait(message)) as descriptor:
            self._locks[fingerprint] = descriptor
            try:
                yield
            finally:
                del self._locks[fingerprint]

    @contextmanager
    def try_lock(self, fingerprint: str) -> Iterator[bool]:
        """Like `lock`, but never waits: yields whether nobody else holds it."""
        with try_file_lock(self._lock_path(fingerprint)) as held:
            yield held

    def lock_descriptor(self, fingerprint: str) -> int | None:
        """Descriptor of a lock that this process holds, for a child that shall share it."""
        return self._locks.get(fingerprint)

    def note_identity(self, fingerprint: str, fields: Mapping[str, Any]) -> None:
        """Keep what a fingerprint is made of beside its artifact, which may be yet to come."""
        folder = self.artifacts_folder / _checked(fingerprint)
        path = (folder if folder.is_dir() else self.work_dir(fingerprint)) / _IDENTITY
        if not path.exists():
            write_atomic(path, canonical_json(fields))

    def identities(self) -> Iterator[tuple[str, dict[str, Any], float]]:
        """Of every finished artifact that tells: fingerprint, its fields, and when it was made."""
        for path in sorted(self.artifacts_folder.glob(f"*/{_IDENTITY}")):
            try:
                made = (path.parent / "artifact.json").stat().st_mtime
                fields = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                continue  # being removed, or damaged: it is only for people
            if isinstance(fields, dict):
                yield path.parent.name, fields, made

    def unfinished(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Of work that has a checkpoint: fingerprint, its fields, and the newest one's name."""
        for path in sorted(self.work_folder.glob(f"*/{_IDENTITY}")):
            checkpoint = self.latest_checkpoint(path.parent.name)
            try:
                fields = json.loads(path.read_bytes())
            except (OSError, ValueError):
                continue  # being removed, or damaged: it is only for people
            if checkpoint is not None and isinstance(fields, dict):
                yield path.parent.name, fields, checkpoint.name

    def latest_checkpoint(self, fingerprint: str) -> Path | None:
        """Folder of the newest checkpoint of unfinished work, or None. It may be damaged."""
        folder = self.work_folder / _checked(fingerprint) / "checkpoints"
        return max(folder.glob("step-*"), default=None)

    def checkpoint_code(self, fingerprint: str) -> dict[str, str]:
        """Digests of the modules that wrote the newest checkpoint; empty where it is damaged."""
        checkpoint = self.latest_checkpoint(fingerprint)
        try:
            assert checkpoint is not None
            code = json.loads((checkpoint / "state.json").read_bytes())["code"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # the stage itself says what is wrong with it
        return code if isinstance(code, dict) else {}

    def publish(self, fingerprint: str, artifact: Artifact) -> None:
        """Turn `work/<fingerprint>/content` into a finished artifact, by one rename.

        The work folder's checkpoints and traces are removed afterwards. Publishing the same
        content again changes nothing.
        """
        work = self.work_dir(fingerprint)
        target = self.artifacts_folder / fingerprint
        if target.exists():
            self._check_same(fingerprint, artifact)
        else:
            with disk_full_named(target):
                self._stage(work, artifact)
                self.artifacts_folder.mkdir(parents=True, exist_ok=True)
                (work / "publish").rename(target)
                sync(self.artifacts_folder)
        for name in ("checkpoints", "traces", "content"):
            shutil.rmtree(work / name, ignore_errors=True)

    def find(self, fingerprint: str) -> AnyArtifact | None:
        """The finished artifact of a fingerprint, or None.

        Looks at the manifest and the files' sizes, not at their bytes. A corrupt artifact is put
        in quarantine, so that the stage is run again.
        """
        return self._sound(fingerprint, lambda artifact: None)

    def find_verified(self, fingerprint: str) -> AnyArtifact | None:
        """Like `find`, but every byte is compared before the artifact is handed out."""
        return self._sound(fingerprint, self.verify)

    def verify(self, artifact: Artifact) -> None:
        """Compare every file with the manifest; raises `CorruptArtifact` naming the file."""
        folder = self.artifacts_folder / _checked(artifact.fingerprint)
        content = folder / "content"
        if artifact.uri != _uri(artifact.fingerprint):
            raise CorruptArtifact(f"{artifact.uri} is not the content of {artifact.fingerprint}")
        check_content(content, _read_manifest(folder, artifact))
        self._verified.add((artifact.fingerprint, artifact.sha256))

    def path(self, artifact: Artifact) -> Path:
        """Folder of an artifact's content, verified once in this process."""
        if (artifact.fingerprint, artifact.sha256) not in self._verified:
            self.verify(artifact)
        return self.root / _uri(artifact.fingerprint)

    def quarantine(self, fingerprint: str) -> None:
        """Put a finished artifact aside, so that its work is done again."""
        target = self.quarantine_folder / f"{_checked(fingerprint)}.{time.time_ns()}"
        self.quarantine_folder.mkdir(parents=True, exist_ok=True)
        try:
            (self.artifacts_folder / fingerprint).rename(target)
        except FileNotFoundError:
            return  # another process was faster
        self._verified = {key for key in self._verified if key[0] != fingerprint}

    def quarantine_work(self, fingerprint: str) -> None:
        """Put unfinished work aside, so that it starts anew; its lock is held."""
        self.quarantine_folder.mkdir(parents=True, exist_ok=True)
        target = self.quarantine_folder / f"{_checked(fingerprint)}.{time.time_ns()}"
        (self.work_folder / fingerprint).rename(target)

    def remove(self, folder: Path) -> None:
        """Delete a folder of the store: it is gone by one rename, its files then one by one."""
        if self.root not in folder.parents:
            raise ValueError(f"{folder} is not in the store {self.root}")
        self.trash_folder.mkdir(parents=True, exist_ok=True)
        target = self.trash_folder / f"{folder.name}.{time.time_ns()}"
        folder.rename(target)
        shutil.rmtree(target)
        self._verified = {key for key in self._verified if key[0] != folder.name}

    def artifacts(self) -> Iterator[AnyArtifact]:
        """Every finished artifact, in order of fingerprint."""
        if not self.artifacts_folder.is_dir():
            return
        for folder in sorted(self.artifacts_folder.iterdir()):
            artifact = self.find(folder.name) if _FINGERPRINT.fullmatch(folder.name) else None
            if artifact is not None:
                yield artifact

    def _lock_path(self, fingerprint: str) -> Path:
        return self.root / "locks" / f"{_checked(fingerprint)}.lock"

    def _sound(self, fingerprint: str, check: Callable[[Artifact], None]) -> AnyArtifact | None:
        folder = self.artifacts_folder / _checked(fingerprint)
        if not folder.is_dir():
            return None
        try:
            artifact = _read_artifact(folder)
            check_sizes(folder / "content", _read_manifest(folder, artifact))
            check(artifact)
        except CorruptArtifact as error:
            if folder.is_dir():  # else another process has put it aside meanwhile
                _log.warning("%s; moved to %s", error, self.quarantine_folder)
                self.quarantine(fingerprint)
            return None
        return artifact

    def _check_same(self, fingerprint: str, artifact: Artifact) -> None:
        published = _read_artifact(self.artifacts_folder / fingerprint)
        if published.sha256 != artifact.sha256:
            raise FileExistsError(
                f"{self.artifacts_folder / fingerprint} is already published with other content "
                f"({published.sha256[:12]}, not {artifact.sha256[:12]}); quarantine it first"
            )

    def _stage(self, work: Path, artifact: Artifact) -> None:
        """Collect everything that is to be renamed in `work/publish`, and flush it to the disk."""
        if artifact.uri != _uri(artifact.fingerprint):
            raise CorruptArtifact(f"{artifact.uri} is not the content of {artifact.fingerprint}")
        manifest = build_manifest(work / "content")
        found = manifest_digest(manifest)
        if found != artifact.sha256:
            raise CorruptArtifact(
                f"{work / 'content'} has digest {found[:12]}, "
                f"but its artifact says {artifact.sha256[:12]}"
            )
        staging = work / "publish"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write_atomic(staging / "manifest.json", canonical_json(manifest))
        write_atomic(staging / "artifact.json", artifact.model_dump_json(indent=1))
        write_atomic(staging / _SEAL, file_digest(staging / "artifact.json") + "\n")
        if (work / _IDENTITY).exists():
            shutil.copyfile(work / _IDENTITY, staging / _IDENTITY)
        _sync_tree(work / "content")
        (work / "content").rename(staging / "content")
        sync(staging)


def _uri(fingerprint: str) -> str:
    return f"artifacts/{_checked(fingerprint)}/content"


def _checked(fingerprint: str) -> str:
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise ValueError(f"{fingerprint!r} is not a fingerprint")
    return fingerprint


def _read_artifact(folder: Path) -> AnyArtifact:
    path = folder / "artifact.json"
    try:
        if file_digest(path) != (folder / _SEAL).read_text(encoding="ascii").strip():
            raise CorruptArtifact(f"{path} has changed since it was sealed")
        artifact = artifact_adapter.validate_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{path} cannot be read: {error}") from error
    if artifact.fingerprint != folder.name:
        raise CorruptArtifact(f"{path} belongs to {artifact.fingerprint}")
    if artifact.uri != _uri(artifact.fingerprint):
        raise CorruptArtifact(f"{path} says that its content is at {artifact.uri}")
    return artifact


def _read_manifest(folder: Path, artifact: Artifact) -> Manifest:
    path = folder / "manifest.json"
    try:
        manifest = parse_manifest(path.read_bytes())
    except (OSError, CorruptArtifact) as error:
        raise CorruptArtifact(f"{path} cannot be read: {error}") from error
    if manifest_digest(manifest) != artifact.sha256:
        raise CorruptArtifact(f"{path} does not have the digest that artifact.json names")
    return manifest


def _sync_tree(content: Path) -> None:
    folders = {content}
    for name in plain_files(content):
        sync(content / name)
        folders.update(parent for parent in (content / name).parents if content in parent.parents)
    for folder in folders:
        sync(folder)

"""The model registry: versions by content, and the aliases `champion` and `previous`."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from infra.files import file_lock
from infra.manifest import CorruptArtifact, build_manifest, manifest_digest
from infra.mlflow_reach import is_away, reaching_client, unavailable
from infra.redaction import redact, redact_value
from schemas.artifacts import PolicyCheckpoint
from schemas.base import UserError

_log = logging.getLogger(__name__)

CHAMPION = "champion"
PREVIOUS = "previous"

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_SHA256_TAG = "posttrain.sha256"
_FINGERPRINT_TAG = "posttrain.fingerprint"
_ROLLBACK_TAG = "posttrain.rolled_back"
_MOVE_TAG = "posttrain.move"
"""On the registered model while its aliases are being moved: where they go."""


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    sha256: str
    fingerprint: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    run_id: str
    """The MLflow run that it was registered from."""


@dataclass(frozen=True)
class _Move:
    """Where the aliases go. Written down first, so that a move cut short can be finished."""

    champion: str
    previous: str | None
    """None where nobody shall hold it."""
    rolled_back: str | None = None
    """The version that is given up, if it is."""
    note: str = ""
    """Why, and when."""


class Registry:
    """The registry at one address. Aliases have no compare-and-set, hence the lock."""

    def __init__(
        self,
        uri: str,
        locks: Path,
        patience: float = 0.0,
        on_wait: Callable[[str], None] = _log.info,
    ) -> None:
        """patience: seconds to wait for a server that is away; `on_wait` is told of a wait."""
        self.uri = uri
        self.client = reaching_client(uri, patience, on_wait)
        self._locks = locks

    def register(
        self,
        name: str,
        artifact: PolicyCheckpoint,
        folder: Path,
        source_run_id: str,
        tags: Mapping[str, str],
    ) -> str:
        """Register a model folder as it is and return its version; the same content once only."""
        with self._lock(name):
            known = self.version_of(name, artifact.sha256)
            if known is not None:
                return known.version
            if manifest_digest(build_manifest(folder)) != artifact.sha256:
                raise CorruptArtifact(f"{folder} is not the artifact {artifact.sha256[:12]}")
            own = {_SHA256_TAG: artifact.sha256, _FINGERPRINT_TAG: artifact.fingerprint}
            all_tags = {**redact_value(tags), **own}
            model = self._upload(name, folder, source_run_id, all_tags)
            self._create_name(name)
            # The place itself and not `models:/ID`, which a local database would look up through
            # MLflow's global address.
            version = self.client.create_model_version(
                name,
                model.artifact_location,
                source_run_id,
                all_tags,
                model_id=model.model_id,
            )
            return str(version.version)

    def version_of(self, name: str, sha256: str) -> RegisteredVersion | None:
        """The version that holds this content, or None."""
        rule = f"name = '{_checked(name)}' and tags.`{_SHA256_TAG}` = '{sha256}'"
        found = self.client.search_model_versions(rule)
        if not found:
            return None
        return self.version(name, str(min(int(entry.version) for entry in found)))

    def version(self, name: str, version: str) -> RegisteredVersion:
        """A version by its number."""
        try:
            return _record(self.client.get_model_version(_checked(name), version))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"model {name} has no version {version}; see `posttrain models`"
            ) from error

    def champion(self, name: str) -> RegisteredVersion | None:
        """The version that users get, or None while there is none."""
        return self.aliased(name, CHAMPION)

    def aliased(self, name: str, alias: str) -> RegisteredVersion | None:
        """The version that holds an alias, or None."""
        version = self._version_by_alias(name, alias)
        return None if version is None else _record(version)

    def find(self, model: str) -> RegisteredVersion:
        """The version that `NAME`, `NAME@ALIAS`, `NAME@VERSION` or `NAME/VERSION` means.

        A bare name means its champion, or the newest version while there is none.
        """
        name, slash, number = model.partition("/")
        if slash:
            return self.version(name, number)
        name, _, which = model.partition("@")
        if which:
            return self.chosen(name, which)
        known = [one for one in self.list_models() if one.name == name]
        if not known:
            raise UserError(f"there is no registered model {name}; posttrain models lists them")
        return next((one for one in known if CHAMPION in one.aliases), known[-1])

    def chosen(self, name: str, alias_or_version: str) -> RegisteredVersion:
        """The version that an alias or a number means."""
        if alias_or_version.isdecimal():
            return self.version(name, alias_or_version)
        found = self.aliased(name, alias_or_version)
        if found is None:
            raise UserError(f"model {name} has no alias {alias_or_version}; see `posttrain models`")
        return found

    def set_tags(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version; others stay."""
        for key, value in redact_value(dict(tags)).items():
            self.client.set_model_version_tag(name, version, key, value)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Move an alias to a version."""
        self.client.set_registered_model_alias(name, alias, version)

    def aliases_of(self, name: str, version: str) -> tuple[str, ...]:
        """Aliases that a version holds, in alphabetical order."""
        return self.version(name, version).aliases

    def promote(self, name: str, version: str) -> None:
        """Make a version the champion; the old one is kept as `previous`.

        Doing it again changes nothing. Raises `CorruptArtifact`, and moves nothing, if the
        version's files are not those that were registered.
        """
        with self._lock(name):
            self._finish_move(name)
            self.verify(name, version)
            old = self.champion(name)
            if old is not None and old.version == version:
                return
            kept = old or self.aliased(name, PREVIOUS)
            self._move(name, _Move(version, kept.version if kept is not None else None))

    def rollback(self, name: str, reason: str) -> tuple[str, str]:
        """Make the previous champion the champion again; returns the versions (from, to).

        After a rollback that was cut short it only finishes that one. Raises `CorruptArtifact`,
        and moves nothing, if the files of the previous champion were changed.
        """
        with self._lock(name):
            finished = self._finish_move(name)
            if finished is not None and finished.rolled_back is not None:
                return finished.rolled_back, finished.champion
            bad, good = self.champion(name), self.aliased(name, PREVIOUS)
            if bad is None or good is None or bad.version == good.version:
                raise UserError(
                    f"model {name} has no previous champion to go back to; "
                    "choose a version with `posttrain promote`"
                )
            self.verify(name, good.version)
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            note = f"{when} to version {good.version}: {redact(reason)}"
            # Nobody holds `previous` then: it would point at the champion itself.
            self._move(name, _Move(good.version, None, bad.version, note))
            return bad.version, good.version

    def mend(self, name: str) -> None:
        """Finish the move of the aliases that a process died in, if there is one."""
        with self._lock(name):
            self._finish_move(name)

    def verify(self, name: str, version: str) -> None:
        """Raise `CorruptArtifact` if a version's files are not those that were registered."""
        self._locks.mkdir(parents=True, exist_ok=True)
        # Beside the store: the folder for temporary files may be small.
        with tempfile.TemporaryDirectory(dir=self._locks.parent, prefix=".verify.") as folder:
            self._fetch(self.version(name, version), Path(folder))

    def list_models(self) -> list[RegisteredVersion]:
        """Every version that this program registered, by name and number."""
        found: list[RegisteredVersion] = []
        for model in self._models():
            # A search leaves a version's aliases out.
            holders = self.client.get_registered_model(model.name).aliases
            for entry in self.client.search_model_versions(f"name = '{model.name}'"):
                if _SHA256_TAG in entry.tags:
                    number = str(entry.version)
                    aliases = [alias for alias, held in holders.items() if str(held) == number]
                    found.append(replace(_record(entry), aliases=tuple(sorted(aliases))))
        return sorted(found, key=lambda one: (one.name, int(one.version)))

    def download(self, name: str, alias_or_version: str, to: Path) -> Path:
        """Fetch a version's folder to `to`, which must not exist; refused if it was changed."""
        if to.exists():
            raise UserError(f"{to} exists already; name a new folder")
        chosen = self.chosen(name, alias_or_version)
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as temporary:
            self._fetch(chosen, Path(temporary)).rename(to)
        return to

    def _fetch(self, chosen: RegisteredVersion, to: Path) -> Path:
        """Copy a version's folder into `to`, compare every byte, and return where it is."""
        source = self.client.get_model_version_download_uri(chosen.name, chosen.version)
        folder = self._copied(source, to)
        if manifest_digest(build_manifest(folder)) != chosen.sha256:
            raise CorruptArtifact(
                f"model {chosen.name} version {chosen.version} is not the content that was "
                f"registered: the files at {source} have changed; restore them, or delete the "
                "version and run its recipe again"
            )
        return folder

    def _copied(self, source: str, to: Path) -> Path:
        try:
            return Path(
                download_artifacts(artifact_uri=source, dst_path=str(to), tracking_uri=self.uri)
            )
        except MlflowException as error:
            if not is_away(error):
                raise
            raise unavailable(self.uri, error) from error

    def _move(self, name: str, move: _Move) -> None:
        """Move the aliases as written down; every step may be done twice."""
        self.client.set_registered_model_tag(name, _MOVE_TAG, json.dumps(asdict(move)))
        self._carry_out(name, move)

    def _carry_out(self, name: str, move: _Move) -> None:
        if move.rolled_back is not None:
            self.set_tags(name, move.rolled_back, {_ROLLBACK_TAG: move.note})
        if move.previous is not None:
            self.set_alias(name, PREVIOUS, move.previous)
        self.set_alias(name, CHAMPION, move.champion)
        if move.previous is None and self.aliased(name, PREVIOUS) is not None:
            self.client.delete_registered_model_alias(name, PREVIOUS)
        self.client.delete_registered_model_tag(name, _MOVE_TAG)

    def _finish_move(self, name: str) -> _Move | None:
        """The move that a process died in, which is then done; None where there is none."""
        try:
            written = self.client.get_registered_model(name).tags.get(_MOVE_TAG)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if written is None:
            return None
        move = _Move(**json.loads(written))
        _log.warning("finishing the move of %s's aliases that was cut short", name)
        self._carry_out(name, move)
        return move

    def _models(self) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = self.client.search_registered_models(page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _upload(self, name: str, folder: Path, source_run_id: str, tags: dict[str, str]) -> Any:
        experiment_id = self.client.get_run(source_run_id).info.experiment_id
        model = self.client.create_logged_model(
            experiment_id,
            name=name.replace(".", "-"),  # a logged model's name cannot have a dot
            source_run_id=source_run_id,
            tags=tags,
            model_type="policy",
        )
        try:
            self.client.log_model_artifacts(model.model_id, str(folder))
        except BaseException:
            self.client.finalize_logged_model(model.model_id, "FAILED")
            raise
        return self.client.finalize_logged_model(model.model_id, "READY")

    def _create_name(self, name: str) -> None:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _version_by_alias(self, name: str, alias: str) -> Any:
        try:
            return self.client.get_model_version_by_alias(_checked(name), alias)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        path = self._locks / f"registry.{_checked(name)}.lock"
        message = "another run is changing the registered model %s; waiting"
        with file_lock(path, lambda: _log.info(message, name)):
            yield


def _checked(name: str) -> str:
    """A registered model's name, which stands in paths and in the registry's queries."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name of a registered model: it has letters, digits, _, . and - only"
        )
    return name


def _record(version: Any) -> RegisteredVersion:
    tags = dict(version.tags)
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),
        sha256=tags.get(_SHA256_TAG, ""),
        fingerprint=tags.get(_FINGERPRINT_TAG, ""),
        aliases=tuple(sorted(version.aliases)),
        tags=tags,
        run_id=version.run_id or "",
    )

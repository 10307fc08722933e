"""The model registry: versions by content, and the aliases `champion` and `previous`."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from infra.files import file_lock
from infra.manifest import CorruptArtifact, build_manifest, manifest_digest
from infra.mlflow_uri import open_client
from schemas.artifacts import PolicyCheckpoint
from schemas.base import UserError

_log = logging.getLogger(__name__)

CHAMPION = "champion"
PREVIOUS = "previous"

_SHA256_TAG = "posttrain.sha256"
_FINGERPRINT_TAG = "posttrain.fingerprint"
_ROLLBACK_TAG = "posttrain.rolled_back"


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    sha256: str
    fingerprint: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


class Registry:
    """The registry at one address. Aliases have no compare-and-set, hence the lock."""

    def __init__(self, uri: str, locks: Path) -> None:
        self.uri = uri
        self.client = open_client(uri)
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
            all_tags = {**tags, **own}
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
        rule = f"name = '{name}' and tags.`{_SHA256_TAG}` = '{sha256}'"
        found = self.client.search_model_versions(rule)
        if not found:
            return None
        return self.version(name, str(min(int(entry.version) for entry in found)))

    def version(self, name: str, version: str) -> RegisteredVersion:
        """A version by its number."""
        try:
            return _record(self.client.get_model_version(name, version))
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

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Move an alias to a version."""
        self.client.set_registered_model_alias(name, alias, version)

    def aliases_of(self, name: str, version: str) -> tuple[str, ...]:
        """Aliases that a version holds, in alphabetical order."""
        return self.version(name, version).aliases

    def promote(self, name: str, version: str) -> None:
        """Make a version the champion; the old one is kept as `previous`."""
        with self._lock(name):
            self.version(name, version)
            old = self.champion(name)
            if old is not None and old.version == version:
                return
            if old is not None:
                self.set_alias(name, PREVIOUS, old.version)
            self.set_alias(name, CHAMPION, version)

    def rollback(self, name: str, reason: str) -> tuple[str, str]:
        """Make the previous champion the champion again; returns the versions (from, to)."""
        with self._lock(name):
            bad, good = self.champion(name), self.aliased(name, PREVIOUS)
            if bad is None or good is None or bad.version == good.version:
                raise UserError(
                    f"model {name} has no previous champion to go back to; "
                    "choose a version with `posttrain promote`"
                )
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            note = f"{when} to version {good.version}: {reason}"
            self.client.set_model_version_tag(name, bad.version, _ROLLBACK_TAG, note)
            self.set_alias(name, CHAMPION, good.version)
            # It would now point at the champion itself.
            self.client.delete_registered_model_alias(name, PREVIOUS)
            return bad.version, good.version

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
        chosen = self._chosen(name, alias_or_version)
        to.parent.mkdir(parents=True, exist_ok=True)
        source = self.client.get_model_version_download_uri(name, chosen.version)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as temporary:
            folder = Path(
                download_artifacts(artifact_uri=source, dst_path=temporary, tracking_uri=self.uri)
            )
            if manifest_digest(build_manifest(folder)) != chosen.sha256:
                raise CorruptArtifact(
                    f"model {name} version {chosen.version} is not the content that was registered"
                )
            folder.rename(to)
        return to

    def _models(self) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = self.client.search_registered_models(page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _chosen(self, name: str, alias_or_version: str) -> RegisteredVersion:
        if alias_or_version.isdigit():
            return self.version(name, alias_or_version)
        found = self.aliased(name, alias_or_version)
        if found is None:
            raise UserError(f"model {name} has no alias {alias_or_version}; see `posttrain models`")
        return found

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
            return self.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        path = self._locks / f"registry.{name}.lock"
        message = "another run is changing the registered model %s; waiting"
        with file_lock(path, lambda: _log.info(message, name)):
            yield


def _record(version: Any) -> RegisteredVersion:
    tags = dict(version.tags)
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),
        sha256=tags.get(_SHA256_TAG, ""),
        fingerprint=tags.get(_FINGERPRINT_TAG, ""),
        aliases=tuple(sorted(version.aliases)),
        tags=tags,
    )

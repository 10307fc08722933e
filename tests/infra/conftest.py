"""Artifacts and requests that are small enough to read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.environment import Home, quiet_environment
from infra.store import Store
from schemas.artifacts import CreatedBy, DatasetArtifact
from schemas.data import DataSource
from schemas.requests import PrepareDataRequest, Runtime

FINGERPRINT = "a" * 64
NOBODY = CreatedBy(posttrain="0", python="3", packages={}, code={})


def dataset(
    store: Store, fingerprint: str = FINGERPRINT, sha256: str | None = None
) -> DatasetArtifact:
    """The artifact of what lies in the work folder."""
    content = store.work_dir(fingerprint) / "content"
    return DatasetArtifact(
        uri=store.content_uri(fingerprint),
        sha256=sha256 or store.seal(content),
        fingerprint=fingerprint,
        created_by=NOBODY,
        split="prompts",
        layout="verifiable",
        num_records=1,
        num_prompts=1,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home with spaces und Ümläute" / "store")


@pytest.fixture
def write(store: Store) -> Callable[..., DatasetArtifact]:
    """Writes content in the work folder of a fingerprint and returns its artifact."""

    def write(fingerprint: str = FINGERPRINT, text: str = "one\n") -> DatasetArtifact:
        content = store.work_dir(fingerprint) / "content"
        (content / "sub").mkdir(parents=True, exist_ok=True)
        (content / "records.jsonl").write_text(text)
        (content / "sub" / "größe.txt").write_text("x" * 100)
        return dataset(store, fingerprint)

    return write


@pytest.fixture
def publish(store: Store, write: Callable[..., DatasetArtifact]) -> Callable[..., DatasetArtifact]:
    """Writes and publishes."""

    def publish(fingerprint: str = FINGERPRINT, text: str = "one\n") -> DatasetArtifact:
        artifact = write(fingerprint, text)
        store.publish(fingerprint, artifact)
        return artifact

    return publish


@pytest.fixture
def request_for(store: Store) -> Callable[[str], PrepareDataRequest]:
    """A request whose `generator` tells the scripted stage what to do."""

    def request_for(behaviour: str) -> PrepareDataRequest:
        return PrepareDataRequest(
            fingerprint=FINGERPRINT,
            runtime=Runtime(store=str(store.root)),
            split="prompts",
            layout="verifiable",
            source=DataSource(generator=f"scripted:{behaviour}"),
        )

    return request_for


@pytest.fixture
def scripted_stage(tmp_path: Path) -> dict[str, str]:
    """Environment in which `python -m stages.main` is the script in `scripted_stage.py`."""
    package = tmp_path / "scripted" / "stages"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    here = Path(__file__).parent
    (package / "main.py").write_text((here / "scripted_stage.py").read_text())
    repository = str(here.parents[1])
    # PYTHONSAFEPATH keeps the current folder, and with it the real stages, off the path.
    return {
        "PYTHONPATH": os.pathsep.join([str(package.parent), repository]),
        "PYTHONSAFEPATH": "1",
    }


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home with a tracking database, made once: that takes some seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "POSTTRAIN_HOME"):
            patch.delenv(name, raising=False)
        folder = tmp_path_factory.mktemp("tracking")
        home = Home.resolve(str(folder / "Haus mit Ümläuten"))
        for name, value in quiet_environment(home).items():
            if name.startswith(("MLFLOW", "DO_NOT_TRACK")):
                patch.setenv(name, value)
        patch.chdir(folder)
        yield home
        strays = {path.name for path in folder.iterdir()} - {home.root.name}
        assert not strays, f"MLflow wrote into the current folder: {strays}"

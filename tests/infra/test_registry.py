from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.environment import Home
from infra.manifest import CorruptArtifact
from infra.mlflow_tracking import Tracking
from infra.registry import Registry
from infra.store import Store
from schemas.artifacts import CreatedBy, ModelContract, PolicyCheckpoint
from schemas.base import UserError

pytestmark = pytest.mark.slow


def policy(store: Store, folder: Path) -> PolicyCheckpoint:
    sha256 = store.seal(folder)
    return PolicyCheckpoint(
        uri=store.content_uri(sha256),
        sha256=sha256,
        fingerprint=sha256,
        created_by=CreatedBy(posttrain="0", python="3", packages={}, code={}),
        algorithm="grpo",
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


@pytest.fixture(scope="module")
def source_run(home: Home) -> str:
    tracking = Tracking(home.mlflow_uri)
    return tracking.open_pipeline_run("registry", "registry", {"posttrain.run": "registry"})


@pytest.fixture
def registry(home: Home) -> Registry:
    return Registry(home.mlflow_uri, home.locks)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model of each test's own."""
    return f"v1.{request.node.name}".replace("[", "-").replace("]", "")


Register = Callable[[str], str]


@pytest.fixture
def register(
    registry: Registry, store: Store, source_run: str, name: str, tmp_path: Path
) -> Register:
    """Registers a folder with one file, and returns the version."""

    def register(text: str) -> str:
        folder = tmp_path / "models" / text
        if not folder.exists():
            (folder / "sub").mkdir(parents=True)
            (folder / "config.json").write_text(text)
            (folder / "sub" / "ü.txt").write_text("x")
        return registry.register(
            name, policy(store, folder), folder, source_run, {"posttrain.run": "r1"}
        )

    return register


def test_a_name_that_nobody_registered(registry: Registry) -> None:
    assert registry.champion("nobody") is None
    assert registry.version_of("nobody", "0" * 64) is None
    with pytest.raises(UserError, match="nobody has no version 1"):
        registry.version("nobody", "1")
    with pytest.raises(UserError, match="nobody has no version 1"):
        registry.promote("nobody", "1")
    with pytest.raises(UserError, match="no previous champion"):
        registry.rollback("nobody", "why not")


def test_the_same_content_is_one_version(
    registry: Registry, register: Register, name: str, tmp_path: Path, store: Store
) -> None:
    assert register("one") == register("one") == "1"
    assert register("two") == "2"
    sha256 = store.seal(tmp_path / "models" / "one")
    found = registry.version_of(name, sha256)
    assert found is not None
    assert (found.version, found.sha256, found.fingerprint) == ("1", sha256, sha256)
    assert found.tags["posttrain.run"] == "r1"
    assert registry.champion(name) is None


def test_two_registrations_at_once_are_one_version(
    registry: Registry, store: Store, source_run: str, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    artifact = policy(store, folder)
    versions: list[str] = []

    def register() -> None:
        versions.append(registry.register(name, artifact, folder, source_run, {}))

    threads = [threading.Thread(target=register) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions == ["1", "1", "1"]


def test_a_folder_that_is_not_the_artifact_is_refused(
    registry: Registry, store: Store, source_run: str, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    artifact = policy(store, folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CorruptArtifact, match="is not the artifact"):
        registry.register(name, artifact, folder, source_run, {})
    assert registry.version_of(name, artifact.sha256) is None


def test_an_upload_that_fails_leaves_no_version(
    registry: Registry, register: Register, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", fail)
        with pytest.raises(OSError, match="disk full"):
            register("one")
    assert register("one") == "1"


def test_promotion_moves_the_aliases(registry: Registry, register: Register, name: str) -> None:
    first, second = register("one"), register("two")
    registry.promote(name, first)
    assert registry.aliases_of(name, first) == ("champion",)
    registry.promote(name, first)
    assert registry.aliases_of(name, first) == ("champion",)
    registry.promote(name, second)
    assert registry.aliases_of(name, first) == ("previous",)
    champion = registry.champion(name)
    assert champion is not None
    assert (champion.version, champion.aliases) == (second, ("champion",))


def test_a_rollback_is_written_down_and_goes_back_once(
    registry: Registry, register: Register, name: str
) -> None:
    first, second = register("one"), register("two")
    registry.promote(name, first)
    with pytest.raises(UserError, match="no previous champion"):
        registry.rollback(name, "there is none")
    registry.promote(name, second)
    assert registry.rollback(name, "answers in French") == (second, first)
    assert registry.aliases_of(name, first) == ("champion",)
    assert registry.aliases_of(name, second) == ()
    note = registry.version(name, second).tags["posttrain.rolled_back"]
    assert note.endswith(f"to version {first}: answers in French")
    with pytest.raises(UserError, match="choose a version with `posttrain promote`"):
        registry.rollback(name, "again")


def test_promotions_at_once_leave_two_different_aliases(
    registry: Registry, register: Register, name: str
) -> None:
    versions = [register(text) for text in ("one", "two", "three")]
    threads = [
        threading.Thread(target=registry.promote, args=(name, version)) for version in versions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    champion, previous = registry.champion(name), registry.aliased(name, "previous")
    assert champion is not None
    assert previous is not None
    assert champion.version != previous.version


def test_models_are_listed_with_their_aliases(
    home: Home, registry: Registry, register: Register, name: str
) -> None:
    first, second = register("one"), register("two")
    registry.promote(name, first)
    registry.promote(name, second)
    client = MlflowClient(tracking_uri=home.mlflow_uri, registry_uri=home.mlflow_uri)
    client.create_registered_model(f"{name}-of-somebody-else")
    client.create_model_version(f"{name}-of-somebody-else", "s3://elsewhere/model")
    listed = [one for one in registry.list_models() if one.name.startswith(name)]
    assert [(one.version, one.aliases) for one in listed] == [
        (first, ("previous",)),
        (second, ("champion",)),
    ]
    assert listed[1] == registry.version(name, second)


def test_more_models_than_a_page_holds_are_listed(
    registry: Registry, register: Register, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("one")
    real = registry.client.search_registered_models
    monkeypatch.setattr(
        registry.client,
        "search_registered_models",
        lambda page_token: real(max_results=1, page_token=page_token),
    )
    registry.client.create_registered_model(f"{name}-empty")
    names = {model.name for model in registry._models()}
    assert {name, f"{name}-empty"} <= names


def test_download_by_alias_and_by_version(
    registry: Registry, register: Register, name: str, store: Store, tmp_path: Path
) -> None:
    registry.promote(name, register("one"))
    by_alias = registry.download(name, "champion", tmp_path / "out" / "a")
    by_version = registry.download(name, "1", tmp_path / "out" / "b")
    assert store.seal(by_alias) == store.seal(by_version) == store.seal(tmp_path / "models/one")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    with pytest.raises(UserError, match="exists already"):
        registry.download(name, "1", by_alias)
    with pytest.raises(UserError, match="has no alias staging"):
        registry.download(name, "staging", tmp_path / "c")


def test_a_registered_model_that_was_changed_is_refused(
    home: Home, registry: Registry, register: Register, name: str, tmp_path: Path
) -> None:
    register("changed afterwards")
    uploaded = [
        path
        for path in (home.mlflow_folder / "artifacts").rglob("config.json")
        if path.read_text() == "changed afterwards"
    ]
    assert len(uploaded) == 1
    uploaded[0].write_text("changed")
    with pytest.raises(CorruptArtifact, match="not the content that was registered"):
        registry.download(name, "1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


LOAD = """
import sys
from mlflow.artifacts import download_artifacts
from transformers import AutoModelForCausalLM
folder = download_artifacts(sys.argv[1], dst_path=sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder)
print(sum(p.double().sum().item() for p in model.parameters()))
"""


def test_transformers_opens_the_champion(
    home: Home, registry: Registry, store: Store, source_run: str, name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    total = sum(p.double().sum().item() for p in model.parameters())
    artifact = policy(store, tmp_path / "model")
    version = registry.register(name, artifact, tmp_path / "model", source_run, {})
    registry.promote(name, version)

    ours = registry.download(name, "champion", tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    assert sum(p.double().sum().item() for p in loaded.parameters()) == total

    (tmp_path / "theirs").mkdir()
    theirs = subprocess.run(
        [sys.executable, "-c", LOAD, f"models:/{name}@champion", str(tmp_path / "theirs")],
        env={**os.environ, "MLFLOW_TRACKING_URI": home.mlflow_uri},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert float(theirs.stdout) == total

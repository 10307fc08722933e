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
from schemas.artifacts import PolicyCheckpoint
from schemas.base import UserError
from tests.artifacts import CONTRACT, NOBODY

pytestmark = pytest.mark.slow


def policy(store: Store, folder: Path) -> PolicyCheckpoint:
    sha256 = store.seal(folder)
    return PolicyCheckpoint(
        uri=store.content_uri(sha256),
        sha256=sha256,
        fingerprint=sha256,
        created_by=NOBODY,
        algorithm="grpo",
        contract=CONTRACT,
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


def flip(home: Home, text: str) -> None:
    """Flip a bit of the registered file that holds a text."""
    uploaded = [
        path
        for path in (home.mlflow_folder / "artifacts").rglob("config.json")
        if path.read_bytes() == text.encode()
    ]
    assert len(uploaded) == 1
    content = bytearray(uploaded[0].read_bytes())
    content[0] ^= 1
    uploaded[0].write_bytes(bytes(content))


def test_a_registered_model_that_was_changed_is_refused(
    home: Home, registry: Registry, register: Register, name: str, tmp_path: Path
) -> None:
    registry.promote(name, register("changed afterwards"))
    second = register("changed before promotion")
    registry.verify(name, "1")
    flip(home, "changed afterwards")
    flip(home, "changed before promotion")
    with pytest.raises(CorruptArtifact, match="not the content that was registered"):
        registry.download(name, "1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CorruptArtifact, match=f"{name} version 2 is not the content"):
        registry.promote(name, second)
    assert registry.aliases_of(name, "1") == ("champion",)
    assert registry.aliases_of(name, second) == ()
    assert not list(home.root.glob(".verify*"))


def test_a_rollback_to_a_model_that_was_changed_is_refused(
    home: Home, registry: Registry, register: Register, name: str
) -> None:
    first, second = register("the good one"), register("the bad one")
    registry.promote(name, first)
    registry.promote(name, second)
    flip(home, "the good one")
    with pytest.raises(CorruptArtifact, match="restore them, or delete the version"):
        registry.rollback(name, "it swears")
    assert registry.aliases_of(name, first) == ("previous",)
    assert registry.aliases_of(name, second) == ("champion",)
    assert "posttrain.rolled_back" not in registry.version(name, second).tags


def test_a_version_is_found_by_what_people_write(
    registry: Registry, register: Register, name: str
) -> None:
    register("one")
    register("two")
    assert registry.find(name).version == "2"  # the newest, while there is no champion
    registry.promote(name, "1")
    for text, version in (("", "1"), ("@champion", "1"), ("@2", "2"), ("/2", "2")):
        assert registry.find(f"{name}{text}").version == version
    with pytest.raises(UserError, match="has no alias staging"):
        registry.find(f"{name}@staging")
    with pytest.raises(UserError, match="there is no registered model nobody"):
        registry.find("nobody")


def test_tags_are_added_to_those_that_are_there(
    registry: Registry, register: Register, name: str
) -> None:
    version = register("one")
    registry.set_tags(name, version, {"a": "1", "posttrain.run": "r2"})
    tags = registry.version(name, version).tags
    assert (tags["a"], tags["posttrain.run"]) == ("1", "r2")
    assert "posttrain.sha256" in tags


KILLED = """
import os, signal, sys
from pathlib import Path
from mlflow import MlflowClient
from infra.registry import Registry

uri, locks, after, command, *arguments = sys.argv[1:]
calls = 0

def then_die(method):
    def call(self, *arguments, **named):
        global calls
        result = method(self, *arguments, **named)
        calls += 1
        if calls == int(after):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for name in (
    "set_registered_model_tag", "set_registered_model_alias", "set_model_version_tag",
    "delete_registered_model_alias", "delete_registered_model_tag",
):
    setattr(MlflowClient, name, then_die(getattr(MlflowClient, name)))
getattr(Registry(uri, Path(locks)), command)(*arguments)
"""


def killed_after(home: Home, num_writes: int, command: str, *arguments: str) -> bool:
    """Run a command that is killed after some writes to the registry; False if it did fewer."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, home.mlflow_uri, str(home.locks), str(num_writes), command,
         *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == -9


def aliases(registry: Registry, name: str) -> dict[str, tuple[str, ...]]:
    return {one.version: one.aliases for one in registry.list_models() if one.name == name}


def test_a_promotion_that_is_killed_anywhere_is_mended_by_the_same_command(
    home: Home, registry: Registry, register: Register, name: str
) -> None:
    for text in ("one", "two", "three", "four"):
        register(text)
    # Written: the move, previous, champion, the end of the move.
    for num_writes in (1, 2, 3, 4):
        registry.promote(name, "1")
        registry.promote(name, "2")
        before = {"1": ("previous",), "2": ("champion",), "3": (), "4": ()}
        after = {"1": (), "2": ("previous",), "3": ("champion",), "4": ()}
        assert aliases(registry, name) == before
        assert killed_after(home, num_writes, "promote", name, "3")
        found = aliases(registry, name)
        # There is a champion at every moment.
        assert sorted(a for held in found.values() for a in held) == ["champion", "previous"] or (
            found["2"] == ("champion", "previous")
        )
        registry.promote(name, "3")
        assert aliases(registry, name) == after, num_writes
        # So does another command: what was begun is finished first.
        registry.promote(name, "4")
        assert aliases(registry, name) == {"1": (), "2": (), "3": ("previous",), "4": ("champion",)}
    assert not killed_after(home, 5, "promote", name, "1")


def test_a_rollback_that_is_killed_anywhere_is_mended_by_the_same_command(
    home: Home, registry: Registry, register: Register, name: str
) -> None:
    register("one")
    register("two")
    # Written: the move, the note, champion, no more previous, the end of the move.
    for num_writes in (1, 2, 3, 4, 5):
        registry.promote(name, "1")
        registry.promote(name, "2")
        assert killed_after(home, num_writes, "rollback", name, f"try {num_writes}")
        if num_writes < 5:
            assert registry.rollback(name, "again") == ("2", "1")
        assert aliases(registry, name) == {"1": ("champion",), "2": ()}
        note = registry.version(name, "2").tags["posttrain.rolled_back"]
        assert note.endswith(f"to version 1: try {num_writes}")
        with pytest.raises(UserError, match="no previous champion"):
            registry.rollback(name, "once more")


def test_another_promotion_finishes_a_rollback_that_was_killed(
    home: Home, registry: Registry, register: Register, name: str
) -> None:
    for text in ("one", "two", "three"):
        register(text)
    registry.promote(name, "1")
    registry.promote(name, "2")
    assert killed_after(home, 1, "rollback", name, "it swears")
    registry.mend(name)
    assert aliases(registry, name) == {"1": ("champion",), "2": (), "3": ()}
    registry.promote(name, "3")
    assert aliases(registry, name) == {"1": ("previous",), "2": (), "3": ("champion",)}


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

"""Nothing that comes from outside names a file outside its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.manifest import CorruptArtifact, build_manifest, check_names, check_sizes, parse_manifest
from infra.registry import Registry
from infra.store import Store
from schemas.artifacts import CreatedBy, DatasetArtifact
from schemas.base import UserError
from schemas.evaluation import RegistryConfig

ENTRY = {"sha256": "0" * 64, "size": 1}
FINGERPRINT = "f" * 64


@pytest.mark.parametrize(
    "name",
    [
        *("../a", "a/../../b", "a/..", "..", ".", "", "/", "/etc/passwd", "//host/share"),
        *("..\\a", "a\\b", "C:\\a", "C:/a", "c:a", "a\0b", "a//b", "./a", "a/", "a/./b", "\ud800"),
    ],
)
def test_a_name_that_leaves_the_folder_or_names_no_file_is_refused(name: str) -> None:
    with pytest.raises(CorruptArtifact):
        check_names({name: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(CorruptArtifact):
        parse_manifest(json.dumps({name: ENTRY}).encode())


@pytest.mark.parametrize("name", ["a", "a/b.json", "...", "..a", "a..b/c", "é", "a b", "-x", ":a"])
def test_a_plain_name_is_kept(name: str) -> None:
    assert parse_manifest(json.dumps({name: ENTRY}).encode()) == {name: ENTRY}


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(["..", ".", "", "a", "/", "\\", "C:", "\0"]), max_size=6))
def test_whatever_is_accepted_is_inside(parts: list[str]) -> None:
    name = "/".join(parts)
    try:
        check_names({name: {"sha256": "0" * 64, "size": 1}})
    except CorruptArtifact:
        return
    folder = Path("/store/content")
    assert folder in (folder / name).resolve().parents


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"a": null}',
        b'{"a": {"sha256": "0", "size": 1}}',
        b'{"a": {"sha256": "%s", "size": -1}}' % (b"0" * 64),
        b'{"a": {"sha256": "%s", "size": true}}' % (b"0" * 64),
        b'{"a": {"sha256": "%s", "size": 1, "more": 1}}' % (b"0" * 64),
    ],
)
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptArtifact, match="the manifest"):
        parse_manifest(text)


@pytest.mark.parametrize("name", ["x" * 100_000, "../" * 50_000])
def test_a_message_about_a_long_name_stays_short(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptArtifact) as caught:
        check_sizes(tmp_path, {name: {"sha256": "0" * 64, "size": 1}})
    assert len(str(caught.value)) < 600


def test_links_are_refused(tmp_path: Path) -> None:
    content = tmp_path / "content"
    (content / "inner").mkdir(parents=True)
    for target in (tmp_path, Path("/etc/passwd"), Path("nowhere"), content):
        link = content / "inner" / "link"
        link.symlink_to(target)
        with pytest.raises(ValueError, match="is a link"):
            build_manifest(content)
        link.unlink()
    (tmp_path / "whole").symlink_to(content)
    with pytest.raises(ValueError, match="is not a folder"):
        build_manifest(tmp_path / "whole")


def published(store: Store) -> DatasetArtifact:
    content = store.work_dir(FINGERPRINT) / "content"
    content.mkdir()
    (content / "a").write_text("a")
    artifact = DatasetArtifact(
        uri=store.content_uri(FINGERPRINT),
        sha256=store.seal(content),
        fingerprint=FINGERPRINT,
        created_by=CreatedBy(posttrain="0", python="3", packages={}, code={}),
        split="prompts",
        layout="verifiable",
        num_records=1,
        num_prompts=1,
    )
    store.publish(FINGERPRINT, artifact)
    return artifact


@pytest.mark.parametrize("uri", ["/etc", "../..", "artifacts/x/content", "artifacts/../x", ""])
def test_an_artifact_that_says_it_is_elsewhere_is_not_followed(tmp_path: Path, uri: str) -> None:
    store = Store(tmp_path)
    artifact = published(store)
    moved = artifact.model_copy(update={"uri": uri})
    with pytest.raises(CorruptArtifact):
        Store(tmp_path).path(moved)
    store.path(artifact)
    # Once verified, the folder still is the store's own idea and not the artifact's.
    assert store.path(moved) == tmp_path / "artifacts" / FINGERPRINT / "content"
    record = tmp_path / "artifacts" / FINGERPRINT / "artifact.json"
    record.write_text(moved.model_dump_json())
    assert store.find(FINGERPRINT) is None


@pytest.mark.parametrize("fingerprint", ["..", "../x", "/x", "a/b", "", "a\0", "a\n", "."])
def test_a_fingerprint_is_no_path(tmp_path: Path, fingerprint: str) -> None:
    store = Store(tmp_path)
    for use in (store.find, store.work_dir, store.content_uri, store.quarantine):
        with pytest.raises(ValueError, match="is not a fingerprint"):
            use(fingerprint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "a' or name != '", "", "a\n", "a\0"])
def test_a_models_name_is_neither_a_path_nor_a_query(tmp_path: Path, name: str) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "locks")
    for use in (
        lambda: registry.champion(name),
        lambda: registry.version(name, "1"),
        lambda: registry.version_of(name, "0"),
        lambda: registry.rollback(name, "why"),
        lambda: registry.download(name, "1", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="is no name of a registered model"):
            use()
    assert not (tmp_path / "locks").exists()
    with pytest.raises(ValidationError):
        RegistryConfig(name=name)

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.manifest import CorruptArtifact
from infra.store import Store
from schemas.artifacts import DatasetArtifact
from schemas.fingerprint import digest

FINGERPRINT = "a" * 64
Write = Callable[..., DatasetArtifact]


def folder(store: Store) -> Path:
    return store.root / "artifacts" / FINGERPRINT


def test_a_published_artifact_is_found_and_its_content_opens(store: Store, publish: Write) -> None:
    artifact = publish()
    assert store.find(FINGERPRINT) == artifact
    assert store.find_verified(FINGERPRINT) == artifact
    assert store.path(artifact) == store.root / store.content_uri(FINGERPRINT)
    assert (store.path(artifact) / "records.jsonl").read_text() == "one\n"
    assert (store.path(artifact) / "sub" / "größe.txt").stat().st_size == 100
    assert list(store.artifacts()) == [artifact]


def test_nothing_is_found_before(store: Store) -> None:
    assert store.find(FINGERPRINT) is None
    assert list(store.artifacts()) == []


def test_a_moved_store_still_opens(store: Store, publish: Write, tmp_path: Path) -> None:
    artifact = publish()
    moved = store.root.rename(tmp_path / "moved")
    assert Store(moved).path(artifact).is_relative_to(moved)


def test_the_digest_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("one", "two", "renamed", "changed"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / ("b" if name == "renamed" else "a")
        file.write_text("y" if name == "changed" else "x")
    os.utime(tmp_path / "two" / "a", (0, 0))
    (tmp_path / "two" / "a").chmod(0o600)
    digests = [store.seal(tmp_path / name) for name in ("one", "two", "renamed", "changed")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_links_and_special_files_are_refused(store: Store, write: Write) -> None:
    write()
    content = store.work_dir(FINGERPRINT) / "content"
    (content / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="link is a link or a special file"):
        store.seal(content)
    (content / "link").unlink()
    os.mkfifo(content / "sub" / "pipe")
    with pytest.raises(ValueError, match="pipe is a link or a special file"):
        store.seal(content)


def test_a_content_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "content").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="not a folder"):
        Store(tmp_path).seal(tmp_path / "content")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a b", "/etc"])
def test_a_fingerprint_cannot_leave_the_store(store: Store, name: str) -> None:
    for method in (store.work_dir, store.find, store.content_uri, store.quarantine):
        with pytest.raises(ValueError, match="not a fingerprint"):
            method(name)


def test_publishing_a_wrong_digest_is_refused(store: Store, write: Write) -> None:
    artifact = write().model_copy(update={"sha256": "0" * 64})
    with pytest.raises(CorruptArtifact, match="has digest"):
        store.publish(FINGERPRINT, artifact)
    assert store.find(FINGERPRINT) is None
    assert (store.work_dir(FINGERPRINT) / "content" / "records.jsonl").exists()


def test_publishing_twice_is_once(store: Store, publish: Write) -> None:
    assert publish() == publish()
    assert store.find(FINGERPRINT) is not None
    assert not (store.work_dir(FINGERPRINT) / "content").exists()


def test_publishing_other_content_is_refused_until_quarantine(
    store: Store, publish: Write, write: Write
) -> None:
    publish()
    other = write(text="two\n")
    with pytest.raises(FileExistsError, match="quarantine it first"):
        store.publish(FINGERPRINT, other)
    store.quarantine(FINGERPRINT)
    store.publish(FINGERPRINT, other)
    assert (store.path(other) / "records.jsonl").read_text() == "two\n"


def test_checkpoints_go_and_the_log_stays(store: Store, write: Write) -> None:
    work = store.work_dir(FINGERPRINT)
    (work / "checkpoints" / "step-1").mkdir(parents=True)
    (work / "stage.log").write_text("hello\n")
    store.publish(FINGERPRINT, write())
    assert sorted(path.name for path in work.iterdir()) == ["stage.log"]


def change_byte(content: Path) -> None:
    (content / "records.jsonl").write_text("onf\n")


def truncate(content: Path) -> None:
    os.truncate(content / "records.jsonl", 2)


def remove(content: Path) -> None:
    (content / "records.jsonl").unlink()


def add(content: Path) -> None:
    (content / "records.jsonl.bak").write_text("one\n")


def link(content: Path) -> None:
    (content / "records.jsonl").unlink()
    (content / "records.jsonl").symlink_to("/etc/hostname")


@pytest.mark.parametrize("damage", [change_byte, truncate, remove, add, link])
def test_verify_names_the_damaged_file(
    store: Store, publish: Write, damage: Callable[[Path], None]
) -> None:
    artifact = publish()
    damage(folder(store) / "content")
    with pytest.raises(CorruptArtifact, match=r"records\.jsonl"):
        store.verify(artifact)
    with pytest.raises(CorruptArtifact):
        Store(store.root).path(artifact)
    assert store.find_verified(FINGERPRINT) is None
    assert store.find(FINGERPRINT) is None


@pytest.mark.parametrize("damage", [truncate, remove, add, link])
def test_find_sees_all_but_changed_bytes(
    store: Store, publish: Write, damage: Callable[[Path], None]
) -> None:
    publish()
    damage(folder(store) / "content")
    assert store.find(FINGERPRINT) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("artifact.json", ""),
        ("artifact.json", '{"type": "dataset"}'),
        ("artifact.json", None),
        ("manifest.json", "{"),
        ("manifest.json", "{}"),
        ("manifest.json", "[]"),
        ("manifest.json", None),
    ],
)
def test_a_corrupt_record_is_quarantined_with_a_warning(
    store: Store, publish: Write, name: str, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = publish()
    if text is None:
        (folder(store) / name).unlink()
    else:
        (folder(store) / name).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert store.find(FINGERPRINT) is None
    assert name in caplog.text
    assert not folder(store).exists()
    assert len(list((store.root / "quarantine").iterdir())) == 1
    publish()
    assert store.find(FINGERPRINT) == artifact


def test_a_changed_number_of_a_record_is_seen(
    store: Store, publish: Write, caplog: pytest.LogCaptureFixture
) -> None:
    publish()
    path = folder(store) / "artifact.json"
    path.write_text(path.read_text().replace('"num_records": 1', '"num_records": 3'))
    with caplog.at_level(logging.WARNING):
        assert store.find(FINGERPRINT) is None
    assert "artifact.json has changed since it was sealed" in caplog.text


def test_an_artifact_in_another_folder_is_corrupt(store: Store, publish: Write) -> None:
    publish()
    folder(store).rename(store.root / "artifacts" / ("b" * 64))
    assert store.find("b" * 64) is None


def test_an_artifact_cannot_point_outside(store: Store, publish: Write) -> None:
    artifact = publish()
    for uri in ("../../etc", "/etc", "artifacts/b/content"):
        with pytest.raises(CorruptArtifact, match="not the content"):
            store.verify(artifact.model_copy(update={"uri": uri}))


def test_a_manifest_cannot_name_files_outside(store: Store, publish: Write) -> None:
    artifact = publish()
    manifest = json.loads((folder(store) / "manifest.json").read_text())
    manifest["../artifact.json"] = manifest.pop("records.jsonl")
    (folder(store) / "manifest.json").write_text(json.dumps(manifest))
    forged = artifact.model_copy(update={"sha256": digest(manifest)})
    with pytest.raises(CorruptArtifact, match="outside the content"):
        store.verify(forged)


def test_verification_happens_once_in_a_process(store: Store, publish: Write) -> None:
    artifact = publish()
    store.path(artifact)
    change_byte(folder(store) / "content")
    store.path(artifact)  # the same process has seen it whole
    store.quarantine(FINGERPRINT)
    publish(text="other\n")
    with pytest.raises(CorruptArtifact):
        store.path(artifact)


def test_a_full_disk_names_the_path_and_leaves_nothing_half(
    store: Store, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        store.publish(FINGERPRINT, artifact)
    assert caught.value.errno == errno.ENOSPC
    assert str(store.root) in str(caught.value)
    monkeypatch.undo()
    assert store.find(FINGERPRINT) is None
    store.publish(FINGERPRINT, artifact)
    assert store.find(FINGERPRINT) == artifact


PUBLISHER = """
import os, sys
from pathlib import Path
from infra.store import Store
from schemas.artifacts import artifact_adapter
calls, limit = 0, int(sys.argv[3])
def deadly(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), 9)
        return real(*arguments, **options)
    return call
os.fsync, os.rename, os.replace = map(deadly, (os.fsync, os.rename, os.replace))
artifact = artifact_adapter.validate_json(Path(sys.argv[2]).read_bytes())
Store(sys.argv[1]).publish(artifact.fingerprint, artifact)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_of_publishing_leaves_all_or_nothing(
    store: Store, write: Write, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    outcomes = []
    for limit in range(1, 30):
        artifact = write()
        record.write_text(artifact.model_dump_json())
        arguments = [sys.executable, "-c", PUBLISHER, str(store.root), str(record), str(limit)]
        code = subprocess.run(arguments, check=False).returncode
        found = Store(store.root).find_verified(FINGERPRINT)
        assert found in (None, artifact)
        outcomes.append((code, found is not None))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        store.publish(FINGERPRINT, write())  # the retry
        assert Store(store.root).find_verified(FINGERPRINT) == artifact
        store.quarantine(FINGERPRINT)
    assert outcomes[-1] == (0, True)
    assert len(outcomes) > 6


def test_one_writer_at_a_time_and_the_other_says_that_it_waits(store: Store) -> None:
    events: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with store.lock(FINGERPRINT, events.append):
            events.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with store.lock(FINGERPRINT, events.append):
        inside.set()
        deadline = time.monotonic() + 10
        while not events and time.monotonic() < deadline:
            time.sleep(0.01)
        events.append("first")
    thread.join()
    assert events == [f"another run is working on {'a' * 12}; waiting", "first", "second"]
    with store.lock("b" * 64, events.append):
        assert len(events) == 3  # another fingerprint does not wait


HOLDER = """
import sys, time
from infra.store import Store
with Store(sys.argv[1]).lock(sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_dead_process_holds_no_lock(store: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.root), FINGERPRINT], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    waits: list[str] = []
    threading.Timer(0.3, holder.kill).start()
    with store.lock(FINGERPRINT, waits.append):
        assert len(waits) == 1
    holder.wait()
    holder.stdout.close()


def test_two_publishers_at_once_leave_one_whole_artifact(store: Store, write: Write) -> None:
    artifact = write()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with store.lock(FINGERPRINT):
                if store.find(FINGERPRINT) is None:
                    store.publish(FINGERPRINT, artifact)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.find_verified(FINGERPRINT) == artifact

"""What the store can do without: old work that no registry alias and no recent run needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from flows.lineage import artifact_name
from flows.runs import RunRecord, Runs
from infra.environment import Home
from infra.store import Store

Kind = Literal["artifact", "work", "quarantine"]

_TAGS = ("posttrain.evaluation", "posttrain.decision", "posttrain.incumbent")
"""Tags of a registered version that name artifacts."""


@dataclass(frozen=True)
class Waste:
    """A folder of the store that nothing needs any more."""

    kind: Kind
    """A finished artifact, a folder in which work happened, or something put aside."""
    fingerprint: str
    """The work it belongs to."""
    folder: Path
    """Where it is."""
    what: str
    """Name of the stage, where it is known."""
    days: float
    """Days since it was last written to."""
    num_bytes: int
    """Size of its files."""


def find_waste(home: Home, keep_days: float, now: datetime | None = None) -> list[Waste]:
    """Everything that would go, the largest first. Nothing younger than `keep_days` does.

    Raises when the registry does not answer: what its aliases need is then not known.
    """
    store, now = home.store, now or datetime.now(UTC)
    cutoff = (now - timedelta(days=keep_days)).timestamp()
    needed = _needed(home, cutoff)
    found: list[Waste] = []
    for kind, folder in _folders(store):
        fingerprint = folder.name.partition(".")[0]
        changed = _changed(folder)
        if changed >= cutoff or (kind != "quarantine" and fingerprint in needed):
            continue
        days = (now.timestamp() - changed) / 86400
        what = _stage(folder) or artifact_name(store.find(fingerprint))
        found.append(Waste(kind, fingerprint, folder, what, days, _size(folder)))
    return sorted(found, key=lambda one: (-one.num_bytes, str(one.folder)))


def delete(home: Home, waste: Sequence[Waste]) -> list[Waste]:
    """Delete what still is waste under its lock; returns what went.

    A run names an artifact in its record before it lets go of the artifact's lock, so that one
    that came meanwhile is seen here.
    """
    store = home.store
    gone: list[Waste] = []
    for one in waste:
        with store.try_lock(one.fingerprint) as held:
            if not held or one.fingerprint in _in_use(store, but=one.fingerprint):
                continue
            try:
                store.remove(one.folder)
            except FileNotFoundError:
                continue  # another one was faster
            gone.append(one)
    shutil.rmtree(store.trash_folder, ignore_errors=True)  # left by one that was killed
    return gone


def print_waste(console: Console, waste: Sequence[Waste], *, deleted: bool) -> None:
    """A table with sizes, and the sum."""
    total = _human(sum(one.num_bytes for one in waste))
    if not waste:
        console.print("Nothing to delete: every artifact is young, or needed.")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("kind", "stage", "fingerprint"):
        table.add_column(column)
    table.add_column("days", justify="right")
    table.add_column("size", justify="right")
    for one in waste:
        row = (one.kind, one.what, one.fingerprint[:12], f"{one.days:.0f}", _human(one.num_bytes))
        table.add_row(*row)
    console.print(table)
    verb = "Deleted" if deleted else "Would delete"
    console.print(f"{verb} {len(waste)} folders, {total}.")


def document(waste: Sequence[Waste], *, deleted: bool) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "deleted": deleted,
        "num_bytes": sum(one.num_bytes for one in waste),
        "folders": [
            {
                "kind": one.kind,
                "stage": one.what,
                "fingerprint": one.fingerprint,
                "folder": str(one.folder),
                "days": round(one.days, 2),
                "num_bytes": one.num_bytes,
            }
            for one in waste
        ],
    }


def _needed(home: Home, cutoff: float) -> set[str]:
    """Fingerprints that an alias, a recent run, or recent work needs, and all before them."""
    store = home.store
    aliased = set(_of_aliases(home))
    needed = aliased | _in_use(store)
    for record in Runs(store.root).all():
        used = {row.fingerprint for row in record.stages}
        decision = next((row.fingerprint for row in record.stages if row.name == "promote"), None)
        if (record.ended or record.started).timestamp() >= cutoff or decision in aliased:
            needed |= used
    for folder in _folders_in(store.work_folder):
        if _changed(folder) >= cutoff:
            needed.add(folder.name)
            needed.update(_read_by(folder))
    return _with_parents(store, needed)


def _of_aliases(home: Home) -> Iterator[str]:
    from infra.registry import Registry

    for version in Registry(home.mlflow_uri, home.locks).list_models():
        if version.aliases:
            # A model fetched back from the registry lies under the digest of its content.
            yield from (version.fingerprint, version.sha256)
            yield from (version.tags[tag] for tag in _TAGS if tag in version.tags)


def _in_use(store: Store, *, but: str = "") -> set[str]:
    """What the runs at work have taken up, and what running stages read and write.

    but: work whose lock the caller holds.
    """
    used = {row.fingerprint for record in _running(store) for row in record.stages}
    for folder in _folders_in(store.work_folder):
        if folder.name not in {but, *used} and _locked(store, folder.name):
            used.add(folder.name)
            used.update(_read_by(folder))
    return used


def _running(store: Store) -> list[RunRecord]:
    return [record for record in Runs(store.root).all() if record.status == "running"]


def _locked(store: Store, fingerprint: str) -> bool:
    with store.try_lock(fingerprint) as free:
        return not free


def _read_by(work: Path) -> Iterator[str]:
    """Fingerprints of the artifacts that a stage's request names."""
    try:
        pending: list[Any] = [json.loads((work / "request.json").read_bytes())]
    except (OSError, ValueError):
        return
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("fingerprint"), str):
                yield value["fingerprint"]
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _with_parents(store: Store, fingerprints: Iterable[str]) -> set[str]:
    found: set[str] = set()
    pending = list(fingerprints)
    while pending:
        fingerprint = pending.pop()
        if fingerprint in found:
            continue
        found.add(fingerprint)
        artifact = store.find(fingerprint)
        pending.extend(artifact.parents if artifact is not None else ())
    return found


def _folders(store: Store) -> Iterator[tuple[Kind, Path]]:
    for folder in _folders_in(store.artifacts_folder):
        yield "artifact", folder
    for folder in _folders_in(store.work_folder):
        yield "work", folder
    for folder in _folders_in(store.quarantine_folder):
        yield "quarantine", folder


def _folders_in(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(f for f in parent.iterdir() if f.is_dir() and not f.name.startswith("."))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _changed(folder: Path) -> float:
    """When the folder was last written to, in seconds since 1970."""
    times = [folder.lstat().st_mtime]
    for path in _files(folder):
        try:
            times.append(path.lstat().st_mtime)
        except FileNotFoundError:
            continue  # work goes on there
    return max(times)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in _files(folder))


def _stage(folder: Path) -> str:
    """The stage that worked in a folder, or whose artifact was put aside."""
    for name in ("identity.json", "request.json"):
        try:
            fields = json.loads((folder / name).read_bytes())
            split = fields.get("split")
            return f"{fields['stage']}:{split}" if split else str(fields["stage"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return ""


def _human(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

"""The manifest of a folder: every file's name, size and digest."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import TypedDict

from infra.files import file_digest
from schemas.fingerprint import digest


class FileEntry(TypedDict):
    """What a manifest knows of one file."""

    sha256: str
    size: int


Manifest = dict[str, FileEntry]
"""Names relative to the folder, with forward slashes, in order."""


class CorruptArtifact(Exception):
    """Content that is not what its manifest says; the message names the file."""


_SHA256 = re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")


def parse_manifest(text: bytes) -> Manifest:
    """A manifest from its JSON; raises `CorruptArtifact` for anything else, and for bad names."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"the manifest is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise CorruptArtifact("the manifest is not an object")
    for name, entry in manifest.items():
        if not _is_entry(entry):
            raise CorruptArtifact(f"the manifest says nothing of use about {_shown(name)}")
    check_names(manifest)
    return manifest


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"sha256", "size"}:
        return False
    sha256, size = entry["sha256"], entry["size"]
    known = isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None
    return known and type(size) is int and size >= 0


def build_manifest(content: Path) -> Manifest:
    """Digest every file of a folder. Only plain files and folders are accepted."""
    manifest: Manifest = {
        name: {"sha256": file_digest(content / name), "size": (content / name).stat().st_size}
        for name in plain_files(content)
    }
    check_names(manifest)
    return manifest


def manifest_digest(manifest: Manifest) -> str:
    """The digest that stands for the whole content."""
    return digest(manifest)


def plain_files(content: Path) -> list[str]:
    """Relative names of the files below a folder, sorted; refuses links, sockets and devices."""
    if content.is_symlink() or not content.is_dir():
        raise ValueError(f"{content} is not a folder")
    names: list[str] = []
    pending = [content]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    pending.append(Path(entry.path))
                elif stat.S_ISREG(mode):
                    names.append(Path(entry.path).relative_to(content).as_posix())
                else:
                    raise ValueError(f"{entry.path} is a link or a special file; write plain files")
    return sorted(names)


def check_names(manifest: Manifest) -> None:
    """Refuse names that leave the folder, on this system or another, and names of no file."""
    for name in manifest:
        path = PurePosixPath(name)
        inside = path.parts and not path.is_absolute() and ".." not in path.parts
        if not inside or "\\" in name or _DRIVE.match(name):
            raise CorruptArtifact(
                f"the manifest names {_shown(name)}, which is outside the content"
            )
        if str(path) != name or "\0" in name or not _encodable(name):
            raise CorruptArtifact(f"the manifest names {_shown(name)}, which is no file's name")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:200]}…")


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_sizes(content: Path, manifest: Manifest) -> None:
    """Compare names and sizes only: cheap, and enough to see a cut or missing file."""
    check_names(manifest)
    try:
        names = plain_files(content)
    except ValueError as error:
        raise CorruptArtifact(str(error)) from error
    for name in sorted(manifest.keys() ^ set(names)):
        state = "is missing" if name in manifest else "is not in the manifest"
        raise CorruptArtifact(f"{content}: {_shown(name)} {state}")
    for name, entry in manifest.items():
        size = (content / name).stat().st_size
        if size != entry["size"]:
            raise CorruptArtifact(f"{content / name} has {size} bytes, not {entry['size']}")


def check_content(content: Path, manifest: Manifest) -> None:
    """Compare every file's size and digest."""
    check_sizes(content, manifest)
    for name, entry in manifest.items():
        if file_digest(content / name) != entry["sha256"]:
            raise CorruptArtifact(f"{content / name} has changed since it was sealed")

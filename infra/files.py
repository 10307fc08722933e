"""Small operations on files that the rest of the package is built on."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Ask the disk to keep a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encodable(text: str) -> str:
    """The text with lone surrogates, which no file can hold, written out as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with disk_full_named(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Name the path and the remedy when the disk is full; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            "the disk is full: free space there, or choose another home with --home",
            str(path),
        ) from error


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold an exclusive lock and yield its descriptor; `on_wait` is called once before a wait.

    The kernel drops the lock when the last process that holds the descriptor is gone. The file
    stays: removing it would let two processes lock two files of one name.
    """
    with _lock_file(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor


@contextmanager
def try_file_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock if it is free, and yield whether it was; never waits."""
    with _lock_file(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    """An open descriptor of a lock's file, which is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        # Closing, and not unlocking: a child that inherited the descriptor keeps the lock.
        os.close(descriptor)

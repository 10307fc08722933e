"""Digests of what a source is made of, taken before any work starts."""

from __future__ import annotations

from pathlib import Path

from infra.code import source_digest
from infra.files import file_digest
from schemas.data import DataSource
from stages.data.files import check_file


def source_digests(source: DataSource, root: Path) -> dict[str, str]:
    """Digests of a source's file, generator and transform, for `request.sources`.

    A missing or empty file and an unknown function raise `UserError` here. No code of the user's
    runs. A hub data set has nothing on this machine to digest: its `revision` names it.
    """
    digests: dict[str, str] = {}
    if source.path is not None:
        path = root / source.path
        check_file(path, source.path)
        digests["path"] = file_digest(path)
    if source.generator is not None:
        digests["generator"] = source_digest(source.generator)
    if source.transform is not None:
        digests["transform"] = source_digest(source.transform)
    return digests

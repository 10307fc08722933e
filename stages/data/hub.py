"""Records from a hub data set."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.base import UserError
from schemas.data import DataSource
from stages.data.raw import RawRecord


def read_hub(source: DataSource) -> Iterator[RawRecord]:
    """Yield the rows of one split of a hub data set."""
    assert source.hub is not None
    import datasets

    name, _, configuration = source.hub.partition(":")
    try:
        rows = datasets.load_dataset(
            name, configuration or None, split=source.hub_split, revision=source.revision
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"hub data set {source.hub}, split {source.hub_split}: cannot be loaded: {reason}; "
            "check the name, hub_split, revision and the connection, log in if it is private, "
            "or download it and name the file with path"
        ) from error
    for number, row in enumerate(rows, 1):
        yield RawRecord(f"{source.hub} {source.hub_split} row {number}", dict(row))

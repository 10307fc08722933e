"""Raw records of any source, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from schemas.base import UserError
from schemas.data import DataSource
from stages.data.files import read_file
from stages.data.functions import read_generator, transformed
from stages.data.hub import read_hub
from stages.data.raw import RawRecord


def read_raw(source: DataSource, root: Path) -> Iterator[RawRecord]:
    """Yield the records of a source, renamed and transformed, each with its place.

    `arguments` go to the generator where there is one, else to the transform. `digest_range` and
    `limit` are not applied here: they need validated records.
    """
    records = _read(source, root)
    if source.columns:
        records = _renamed(records, source.columns)
    if source.transform is not None:
        arguments = {} if source.generator is not None else source.arguments
        records = transformed(records, source.transform, arguments)
    return records


def _read(source: DataSource, root: Path) -> Iterator[RawRecord]:
    if source.path is not None:
        return read_file(root / source.path, source.path)
    if source.hub is not None:
        return read_hub(source)
    assert source.generator is not None
    return read_generator(source.generator, source.arguments)


def _renamed(records: Iterable[RawRecord], columns: Mapping[str, str]) -> Iterator[RawRecord]:
    taken = set(columns.values())
    for raw in records:
        value = raw.value
        for name, column in columns.items():
            if column not in value:
                raise UserError(
                    f"{raw.place}: no field {column}, which columns reads {name} from; "
                    f"it has {raw.names()}"
                )
        renamed = {name: item for name, item in value.items() if name not in taken}
        renamed.update({name: value[column] for name, column in columns.items()})
        yield RawRecord(raw.place, renamed)

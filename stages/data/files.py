"""Records from files: JSON lines, a JSON array, Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from schemas.base import UserError
from stages.data.raw import RawRecord

SUFFIXES = (".jsonl", ".json", ".parquet")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def check_file(path: Path, name: str) -> None:
    """Raise `UserError` unless the path is a file of a kind that is read here, and not empty."""
    if not path.exists():
        raise UserError(f"{name}: no such file ({path}); check path and data.root")
    if not path.is_file():
        raise UserError(f"{name}: not a file ({path}); name one file, not a folder")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{name}: unknown kind of file {path.suffix or '(no suffix)'}; "
            f"records are read from {', '.join(SUFFIXES)}"
        )
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise UserError(f"{name}: cannot be opened: {error.strerror}") from error
    if empty:
        raise UserError(f"{name}: the file is empty; it needs at least one record")


def read_file(path: Path, name: str) -> Iterator[RawRecord]:
    """Yield the records of a file, which messages call by the given name."""
    check_file(path, name)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, name)
    if path.suffix.lower() == ".json" and _begins_an_array(path):
        return _read_array(path, name)
    return _read_lines(path, name)


def _read_lines(path: Path, name: str) -> Iterator[RawRecord]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{name} line {number}"
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            text = _decode(line, place)
            if text.strip():
                yield RawRecord(place, _as_object(_parse(text, place), place))


def _begins_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()
    return head.startswith(b"[")


def _read_array(path: Path, name: str) -> Iterator[RawRecord]:
    lines = path.read_bytes().removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    text = "\n".join(_decode(line, f"{name} line {n}") for n, line in enumerate(lines, 1))
    for number, value in enumerate(_parse(text, name), 1):
        place = f"{name} item {number}"
        yield RawRecord(place, _as_object(value, place))


def _decode(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; "
            "save the file as UTF-8"
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text.rstrip("\r\n"), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"{place} line {error.lineno}" if " line " not in place else place
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{place}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value; write a number or null")


def _as_object(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    remedy = "write one JSON object {...} a line"
    if isinstance(value, list):
        remedy += ", or name a file that is one array .json"
    raise UserError(f"{place}: {kinds.get(type(value), 'a number')}, not an object; {remedy}")


def _read_parquet(path: Path, name: str) -> Iterator[RawRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield RawRecord(f"{name} row {number}", value)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: not a readable Parquet file (after row {number}): {reason}"
        ) from error

"""The user's own functions: generators of records, and transforms of raw ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from infra.code import load_function
from schemas.base import UserError
from stages.data.raw import RawRecord

_MENDABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""Errors of a user's function that running it again would not mend."""


def read_generator(path: str, arguments: Mapping[str, Any]) -> Iterator[RawRecord]:
    """Yield the records that a generator function makes."""
    function = load_function(path)
    _check_arguments(function, path, arguments)
    number = 0
    try:
        for value in _iterable(function(**arguments), path):
            number += 1
            place = f"{path} record {number}"
            yield RawRecord(place, _record(value, place))
    except UserError:
        raise
    except _MENDABLE as error:
        raise UserError(f"{path}: after {number} records: {_say(error)}") from error


def transformed(
    records: Iterable[RawRecord], path: str, arguments: Mapping[str, Any]
) -> Iterator[RawRecord]:
    """Yield what a transform function makes of each raw record."""
    function = load_function(path)
    _check_arguments(function, path, arguments, {})
    for raw in records:
        for number, value in enumerate(_transform(function, path, raw, arguments), 1):
            place = f"{raw.place}, record {number} of {path}"
            yield RawRecord(place, _record(value, place))


def _check_arguments(
    function: Callable[..., Any], path: str, arguments: Mapping[str, Any], *positional: Any
) -> None:
    """Raise `UserError` naming the argument that the function lacks or does not know."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # Some functions written in C have none.
        return
    try:
        signature.bind(*positional, **arguments)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[len(positional) :])
        raise UserError(
            f"{path}: {error}; its arguments are: {known or 'none'} (set them under arguments)"
        ) from error


def _transform(
    function: Callable[..., Any], path: str, raw: RawRecord, arguments: Mapping[str, Any]
) -> list[Any]:
    try:
        return list(_iterable(function(raw.value, **arguments), path))
    except UserError:
        raise
    except _MENDABLE as error:
        raise UserError(f"{raw.place}: {path} failed: {_say(error)}") from error


def _iterable(value: Any, path: str) -> Iterable[Any]:
    if isinstance(value, dict | str) or not isinstance(value, Iterable):
        raise UserError(
            f"{path} returned a {type(value).__name__}; it must yield records, or return a list"
        )
    return value


def _record(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: a {type(value).__name__}, not a record; it must be a dict")
    return value


def _say(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no field {error}"
    lines = str(error).splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0]}"

"""The slices of an evaluation: its records by a field of their metadata."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from schemas.base import UserError
from schemas.evaluation import SliceConfig

Members = dict[str, list[str]]
"""Ids of the records of each slice, by the value that they share."""


def find_slices(
    records: Iterable[Mapping[str, Any]], configs: Sequence[SliceConfig]
) -> list[Members]:
    """The slices of each field. Raises one `UserError` for everything that the data lack.

    It needs the records only, so it is asked for before any training as well as by the gate.
    """
    rows = list(records)
    problems: list[str] = []
    found: list[Members] = []
    for index, config in enumerate(configs):
        try:
            found.append(_members(rows, config, f"gate.slices.{index}"))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return found


def _members(rows: Sequence[Mapping[str, Any]], config: SliceConfig, place: str) -> Members:
    members: Members = defaultdict(list)
    missing: list[str] = []
    for row in rows:
        value = row.get("metadata", {}).get(config.field)
        if value is None:
            missing.append(row["id"])
        else:
            members[_label(value, f"{place}.field {config.field}: record {row['id']}")].append(
                row["id"]
            )
    if missing:
        raise UserError(
            f"{place}.field {config.field}: {len(missing)} of the {len(rows)} records of "
            f"data.evaluation have no such field, for example {missing[0]}; "
            f"{_hint(rows, config.field)}"
        )
    sizes = ", ".join(f"{label} ({len(ids)})" for label, ids in sorted(members.items()))
    wanted = [str(value) for value in config.values] or list(members)
    small = [label for label in wanted if len(members.get(label, ())) < config.min_records]
    if small and (config.values or len(small) == len(wanted)):
        raise UserError(
            f"{place}: fewer than {config.min_records} records of data.evaluation have "
            f"{config.field} {', '.join(sorted(small))}; there are {sizes}: add records, "
            f"lower {place}.min_records, or name other values"
        )
    return {label: members[label] for label in sorted(wanted)}


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of whole numbers with gaps is read as one of floats
    if isinstance(value, str | int):
        return str(value)
    raise UserError(
        f"{where} has the value {value!r}; a slice is named by a text, a whole number or a "
        "boolean: derive such a field with a transform"
    )


def _hint(rows: Sequence[Mapping[str, Any]], field: str) -> str:
    known = sorted({name for row in rows for name in row.get("metadata", {})} - {field})
    if not known:
        return "columns of the source beside prompt and answer become such fields"
    nearest = difflib.get_close_matches(field, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"fields there: {', '.join(known)}"

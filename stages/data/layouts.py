"""From raw records to records of a layout, with a message that names the place and the remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from schemas.base import UserError
from schemas.data import Layout
from schemas.records import LAYOUT_FIELDS, RECORD_TYPES, Record
from stages.data.raw import RawRecord

_SHAPES = ("text", "messages")
"""Tags of the two forms of a prompt, which pydantic puts into an error's path."""


def validate_record(raw: RawRecord, layout: Layout, split: str = "this split") -> Record:
    """The raw record as a record of the layout, or a `UserError` that says what to mend.

    Further fields are kept as `metadata` of a verifiable record, and left out of the others.
    """
    wanted = LAYOUT_FIELDS[layout]
    for field in wanted:
        if field not in raw.value:
            raise UserError(f"{raw.place}: {_missing(raw, field, layout, split)}")
    fields = {field: raw.value[field] for field in wanted}
    if layout == "verifiable":
        fields["metadata"] = _metadata(raw)
    try:
        return RECORD_TYPES[layout].model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{raw.place}: {_explain(error, fields)}") from error


def other_fields(raw: RawRecord, layout: Layout) -> set[str]:
    """Fields of a raw record that its layout has no place for."""
    if layout == "verifiable":
        return set()
    return set(raw.value) - set(LAYOUT_FIELDS[layout])


def _metadata(raw: RawRecord) -> dict[str, Any]:
    own = raw.value.get("metadata")
    if own is not None and not isinstance(own, Mapping):
        raise UserError(f"{raw.place}: metadata must be an object, not a {type(own).__name__}")
    known = (*LAYOUT_FIELDS["verifiable"], "metadata")
    others = {name: value for name, value in raw.value.items() if name not in known}
    return {**others, **(own or {})}


def _missing(raw: RawRecord, field: str, layout: Layout, split: str) -> str:
    expects = f"data.{split} expects {', '.join(LAYOUT_FIELDS[layout])}"
    found = _looks_like(raw.value)
    if found is not None:
        return (
            f"no field {field}: this looks like {found}: it has fields "
            f"{', '.join(LAYOUT_FIELDS[found])}; {expects}"
        )
    return (
        f"no field {field}: it has {raw.names()}; {expects}: "
        "rename fields with columns, or make records with a transform"
    )


def _looks_like(fields: Collection[str]) -> Layout | None:
    """The layout whose fields are all there; the one with most fields where several are."""
    fitting = [name for name, needs in LAYOUT_FIELDS.items() if all(n in fields for n in needs)]
    return max(fitting, key=lambda name: len(LAYOUT_FIELDS[name]), default=None)


def _explain(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """The first fault in one sentence, and how many others there are."""
    faults = error.errors(include_url=False)
    first = faults[0]
    text = _sentence(first["type"], first["msg"], first["input"], first.get("ctx", {}))
    field = _field(first["loc"])
    others = len(faults) - 1
    more = f" (and {others} more fault{'s' if others > 1 else ''} in this record)" if others else ""
    if not field:
        return text + more
    return f"field {field}: {text}{more}"


def _field(location: Sequence[int | str]) -> str:
    """`messages[2].role` from an error's path."""
    path = ""
    for depth, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (depth == 1 and part in _SHAPES):
            path += f".{part}" if path else part
    return path


def _sentence(kind: str, message: str, value: Any, context: Mapping[str, Any]) -> str:
    match kind:
        case "value_error":
            return str(context["error"])
        case "missing":
            return "is missing; a message has role and content"
        case "extra_forbidden":
            return "is not supported; a message has role and content only: drop it with a transform"
        case "union_tag_not_found":
            return f"must be text or a list of messages, not {_kind(value)}"
        case "string_type":
            return f"must be text, not {_kind(value)}"
        case "tuple_type":
            return f"must be a list, not {_kind(value)}"
        case "model_type" | "model_attributes_type":
            return f"must be a message with role and content, not {_kind(value)}"
        case "too_short":
            return f"has {context['actual_length']} entries; it needs {context['min_length']}"
        case "literal_error":
            return f"is {reprlib.repr(value)}; it must be {context['expected']}"
        case _:
            return message


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", type(None): "null", int: "a number"}
    names |= {float: "a number", bool: "a boolean", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")

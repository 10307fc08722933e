"""A raw record and the place where it stands."""

from __future__ import annotations

from typing import Any, NamedTuple

_LONGEST, _MOST = 80, 40
"""Characters of a field's name, and fields, that a message shows."""


class RawRecord(NamedTuple):
    """One record of a source, as it was read."""

    place: str
    """Where it stands, for messages: `train.jsonl line 12`."""
    value: dict[str, Any]
    """Its fields."""

    def names(self) -> str:
        """The names of its fields, for messages."""
        names = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in self.value]
        shown = [name if name.isprintable() else repr(name) for name in names[:_MOST]]
        more = [f"and {len(names) - _MOST} more"] if len(names) > _MOST else []
        return ", ".join([*shown, *more]) or "no fields"

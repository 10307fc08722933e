"""A raw record and the place where it stands."""

from __future__ import annotations

from typing import Any, NamedTuple


class RawRecord(NamedTuple):
    """One record of a source, as it was read."""

    place: str
    """Where it stands, for messages: `train.jsonl line 12`."""
    value: dict[str, Any]
    """Its fields."""

    def names(self) -> str:
        """The names of its fields, for messages."""
        shown = (name if name.isprintable() else repr(name) for name in map(str, self.value))
        return ", ".join(shown) or "no fields"

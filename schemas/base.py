"""The base of every configuration, request and artifact."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """An immutable record that refuses unknown fields, infinities and NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        validate_default=True,
    )


class UserError(ValueError):
    """Something that the user can mend; the message names the place and the remedy.

    It is never retried, and ends the command with exit code 2.
    """

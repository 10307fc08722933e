"""Which base model a pipeline starts from."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from schemas.base import Frozen

_TRUSTED = re.compile(r"[\w.-]+(?:/[\w.-]+)?@[0-9a-f]{40}|sha256:[0-9a-f]{64}", re.ASCII)
"""A hub model at a commit, or a folder by the digest of its Python files."""


class BuiltModel(Frozen):
    """A Llama with random weights and a character tokenizer, both made in code."""

    alphabet: str
    """Every character that the tokenizer knows; each becomes one token."""
    hidden_size: int = Field(default=128, ge=8)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=384, ge=8)
    """Width of the gated MLP."""
    num_layers: int = Field(default=3, ge=1)
    """Decoder layers."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads (as many key-value heads)."""
    max_positions: int = Field(default=256, ge=8)
    """Context length in tokens."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    chat_template: str | None = None
    """Jinja template for `messages`, or None."""


class ModelConfig(Frozen):
    """The base model: exactly one of `built`, `path` and `hub`."""

    built: BuiltModel | None = None
    """A small model made from a configuration."""
    path: str | None = None
    """A Hugging Face folder, or `package:NAME` for the folder of an installed Python package."""
    hub: str | None = None
    """A hub model, `owner/name`."""
    revision: str | None = None
    """Revision of the hub model."""
    gguf_file: str | None = None
    """File name of a GGUF checkpoint inside the folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which parameters are trained and saved."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run, each pinned: `owner/name@COMMIT` for the hub, with all 40
    digits of the commit, or `sha256:DIGEST` of a folder's Python files. Only after reading it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [n for n in ("built", "path", "hub") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "a model needs exactly one of built, path and hub; "
                f"it has {', '.join(given) or 'none'}"
            )
        for entry in self.trust_remote_code:
            if not _TRUSTED.fullmatch(entry):
                raise ValueError(
                    f"trust_remote_code: {entry!r} does not pin the code: write owner/name@COMMIT "
                    "with all 40 digits of the commit, or sha256:DIGEST for a folder"
                )
            name, _, commit = entry.partition("@")
            if commit and name == self.hub and commit != self.revision:
                raise ValueError(
                    f"trust_remote_code lists {name} at commit {commit}, but model.revision is "
                    f"{self.revision or 'not set'}: set it to the commit whose code you have read"
                )
        return self

    def content(self) -> dict[str, Any]:
        """What identifies the model's content, apart from the files behind `path`.

        The code that may run is among those files, or named by the hub's commit: what counts here
        is only whether any may.
        """
        content = self.model_dump(mode="json", exclude={"path"})
        return content | {"trust_remote_code": bool(self.trust_remote_code)}

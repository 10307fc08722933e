"""The digest that says whether work is already done."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from schemas.artifacts import Artifact
from schemas.data import DataSource
from schemas.model import ModelConfig
from schemas.requests import StageRequest
from schemas.rewards import RewardConfig
from schemas.rl import RLConfig, RolloutConfig
from schemas.training import SupervisedConfig

_LEFT_OUT = {"fingerprint", "runtime"}
_WITH_CONTENT = (
    ModelConfig,
    DataSource,
    RewardConfig,
    RolloutConfig,
    RLConfig,
    SupervisedConfig,
)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: object) -> str:
    """sha256 of the canonical JSON of a value, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def fingerprint_fields(request: StageRequest) -> dict[str, Any]:
    """Everything that the fingerprint is made of, by field.

    An input artifact counts as its content digest, so work is shared between runs that reached
    the same content by different ways.
    """
    fields: dict[str, Any] = {"version": request.VERSION}
    for name in type(request).model_fields:
        if name not in _LEFT_OUT:
            fields[name] = _identity(getattr(request, name))
    return fields


def fingerprint(request: StageRequest) -> str:
    """The fingerprint of a request: 64 hexadecimal digits."""
    return digest(fingerprint_fields(request))


def _identity(value: Any) -> Any:
    if isinstance(value, Artifact):
        return value.sha256
    if isinstance(value, _WITH_CONTENT):
        return value.content()
    if isinstance(value, tuple):
        return [_identity(item) for item in value]
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value


def parents(request: StageRequest) -> tuple[str, ...]:
    """Fingerprints of the artifacts that a request reads."""
    found: list[str] = []
    for name in type(request).model_fields:
        value = getattr(request, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Artifact):
                found.append(item.fingerprint)
    return tuple(found)

"""What may be read of a base model's folder: safetensors, and its own code only if it is listed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infra.files import file_digest
from schemas.base import UserError
from schemas.fingerprint import digest
from schemas.model import ModelConfig

_DIGEST = "sha256:"
_WITH_CODE = ("config.json", "tokenizer_config.json")
"""Files whose `auto_map` names classes in the model's own code."""


def code_digest(folder: Path) -> str:
    """`sha256:DIGEST` of the names and contents of every Python file below a model's folder."""
    files = sorted(path for path in folder.rglob("*.py") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    return _DIGEST + digest(digests)


def may_run_code(config: ModelConfig, folder: Path | None) -> bool:
    """Whether `trust_remote_code` lists the model as it is; folder: of a local model.

    Raises `UserError` for a folder whose code is another than the listed one, and for a listed
    folder that takes code from elsewhere.
    """
    if folder is None:
        return f"{config.hub}@{config.revision}" in config.trust_remote_code
    listed = [entry for entry in config.trust_remote_code if entry.startswith(_DIGEST)]
    if not listed:
        return False
    found = code_digest(folder)
    if found not in listed:
        raise UserError(
            f"model.trust_remote_code: the Python files in {folder} are not those that were "
            f"listed: read them, then list {found}"
        )
    for name in _WITH_CODE:
        check_code_is_own(f"model.path {folder}", _read_json(folder / name))
    return True


def check_code_is_own(model: str, content: Mapping[str, Any]) -> None:
    """Raise `UserError` if a configuration takes code from another repository than the model's."""
    for reference in _references(content.get("auto_map")):
        if "--" in reference:
            raise UserError(
                f"{model} takes code from {reference.partition('--')[0]}, whose revision nothing "
                "pins: put that code into the model's own folder"
            )


def code_remedy(config: ModelConfig) -> str:
    """What to do about a model that needs its own code and is not listed."""
    if config.path is None:
        entry = f"{config.hub}@COMMIT, with model.revision set to that commit"
    else:
        entry = code_digest(Path(config.path))
    return (
        "it needs code that it ships itself, which is not run unasked: read that code, then list "
        f"{entry} in model.trust_remote_code"
    )


def check_weight_files(config: ModelConfig, folder: Path) -> None:
    """Raise `UserError` for a folder without safetensors (GGUF files apart)."""
    if config.gguf_file is None and not any(folder.glob("*.safetensors")):
        raise UserError(f"model.path {folder}: {safetensors_remedy(str(folder))}")


def safetensors_remedy(source: str) -> str:
    """What to do about a model without safetensors."""
    return (
        "it has no .safetensors file, and pickled weights (.bin, .pt) are not read, for they can "
        "hold code; if you trust them, convert them once and set model.path to the new folder: "
        'python -c "import transformers as t; '
        f"t.AutoModelForCausalLM.from_pretrained('{source}').save_pretrained('converted'); "
        f"t.AutoTokenizer.from_pretrained('{source}').save_pretrained('converted')\""
    )


def _references(auto_map: Any) -> Iterator[str]:
    """Every class that an `auto_map` names; a tokenizer's may be a list, or hold null."""
    values = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    for value in values:
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                yield reference


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, Mapping) else {}

"""Checkpoints inside a stage: killed and resumed equals uninterrupted, to the bit on CPU."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.files import file_digest, sync
from stages.optimization import Optimizer

logger = logging.getLogger(__name__)

_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: Path
    step: int
    extra: dict[str, Any]
    """JSON state: data cursor, KL controller, histories."""


class Checkpoints:
    """Writes and finds the checkpoints of one stage.

    Each is a folder `step-NNNNNNNN` that appears by one rename and holds the digest of every file;
    one that fails its digest is passed over for the one before. Tensors are safetensors, optimizer
    state is read with `weights_only`: nothing is ever unpickled.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
    ) -> None:
        self._folder = folder
        self._models = models
        self._optimizers = optimizers

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Write the state after `step` steps and drop all but the last two."""
        final = self._folder / f"step-{step:08d}"
        temporary = self._folder / f".{final.name}.{os.getpid()}"
        self._drop_unfinished()
        temporary.mkdir(parents=True)
        try:
            self._write(temporary, step, extra)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except BaseException:
            # On a full disk, what is unfinished holds the space that the stage's last words need.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(self._folder)
        for old in self._found()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _drop_unfinished(self) -> None:
        """Remove what a killed process has left; nobody else writes here."""
        for folder in self._folder.glob(".step-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, folder: Path, step: int, extra: Mapping[str, Any]) -> None:
        for name, model in self._models.items():
            save_file(_unshared(model.state_dict()), folder / f"{name}.safetensors")
        for name, optimizer in self._optimizers.items():
            torch.save(optimizer.state_dict(), folder / f"{name}.optimizer.pt")
        torch.save(_rng_state(), folder / "rng.pt")
        state = {"step": step, "extra": dict(extra)}
        (folder / "state.json").write_text(json.dumps(state))
        digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
        (folder / "manifest.json").write_text(json.dumps(digests))
        for path in folder.iterdir():
            sync(path)
        sync(folder)

    def resume(self) -> Checkpoint | None:
        """Load the newest intact checkpoint into the models, the optimizers and the RNGs."""
        for folder in reversed(self._found()):
            problem = _damage(folder)
            if problem:
                logger.warning("checkpoint %s is damaged (%s); passing it over", folder, problem)
                continue
            return self._load(folder)
        return None

    def _load(self, folder: Path) -> Checkpoint:
        for name, model in self._models.items():
            missing, unexpected = model.load_state_dict(
                load_file(folder / f"{name}.safetensors"), strict=False
            )
            assert not unexpected, unexpected
            # Tied parameters are stored once; anything else that is missing is damage.
            stored = set(_unshared(model.state_dict()))
            assert not stored & set(missing), missing
        for name, optimizer in self._optimizers.items():
            state = torch.load(folder / f"{name}.optimizer.pt", weights_only=True)
            optimizer.load_state_dict(state)
        _restore_rng(torch.load(folder / "rng.pt", weights_only=True))
        state = json.loads((folder / "state.json").read_text())
        return Checkpoint(folder, state["step"], state["extra"])

    def _found(self) -> list[Path]:
        return sorted(self._folder.glob("step-*")) if self._folder.is_dir() else []


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied parameters once: safetensors refuses two names for one storage."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for name in sorted(state):
        tensor = state[name]
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen or tensor.numel() == 0:
            seen.add(key)
            kept[name] = tensor.contiguous()
    return kept


def _damage(folder: Path) -> str | None:
    try:
        digests = json.loads((folder / "manifest.json").read_text())
        for name, expected in digests.items():
            if file_digest(folder / name) != expected:
                return f"{name} does not match its digest"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

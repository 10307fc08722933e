"""Checkpoints inside a stage: killed and resumed equals uninterrupted, to the bit on CPU."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.code import changed_code, loaded_code
from infra.files import file_digest, sync
from stages import heartbeat
from stages.optimization import Optimizer

logger = logging.getLogger(__name__)

_KEPT = 2

_DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError)
"""What reading files that somebody else may have written can raise."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: Path
    step: int
    extra: dict[str, Any]
    """JSON state: data cursor, KL controller, histories."""
    changed_code: tuple[str, ...] = ()
    """Files whose code is another one now than when it was written."""


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds beside the models' tensors."""

    step: int
    extra: dict[str, Any]
    code: dict[str, str]
    optimizers: dict[str, dict[str, Any]]
    rng: dict[str, Any]


class Checkpoints:
    """Writes and finds the checkpoints of one stage.

    Each is a folder `step-NNNNNNNN` that appears by one rename and holds the digest of every file;
    one that fails its digest is passed over for the one before. Tensors are safetensors, optimizer
    state is read with `weights_only`: nothing is ever unpickled. Frozen parameters are left out:
    they are what the stage has loaded.
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

    def save(self, step: int, extra: Mapping[str, Any], keep: Collection[int] = ()) -> None:
        """Write the state after `step` steps; drop all but the last two, and those of steps `keep`.

        The caller has made sure by `ruined` that every parameter is finite.
        """
        heartbeat.beat(f"writing the checkpoint of step {step}")
        final = self._folder / _name(step)
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
        kept = {_name(step) for step in keep}
        for old in self._found()[:-_KEPT]:
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def ruined(self) -> str | None:
        """Name of a parameter that is not finite, if there is one: that is no good checkpoint."""
        for name, model in self._models.items():
            for key, parameter in model.named_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    return f"{name}.{key}"
        return None

    def resume(self, last: int | None = None) -> Checkpoint | None:
        """Load the newest intact checkpoint into the models, the optimizers and the RNGs.

        last: checkpoints of later steps are deleted first; training goes back beyond them.
        """
        if last is not None:
            for folder in self._found():
                if folder.name > _name(last):
                    shutil.rmtree(folder)
        for folder in reversed(self._found()):
            heartbeat.beat(f"reading checkpoint {folder.name}")
            try:
                _check_digests(folder)
                state = self._read_state(folder)
            except _DAMAGED as error:
                logger.warning("checkpoint %s is damaged (%s); passing it over", folder, error)
                continue
            return self._load(folder, state)
        return None

    def _drop_unfinished(self) -> None:
        """Remove what a killed process has left; nobody else writes here."""
        for folder in self._folder.glob(".step-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, folder: Path, step: int, extra: Mapping[str, Any]) -> None:
        for name, model in self._models.items():
            save_file(_state(model), folder / f"{name}.safetensors")
        for name, optimizer in self._optimizers.items():
            torch.save(optimizer.state_dict(), folder / f"{name}.optimizer.pt")
        torch.save(_rng_state(), folder / "rng.pt")
        state = {"step": step, "extra": dict(extra), "code": loaded_code()}
        (folder / "state.json").write_text(json.dumps(state))
        digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
        (folder / "manifest.json").write_text(json.dumps(digests))
        for path in folder.iterdir():
            sync(path)
        sync(folder)

    def _read_state(self, folder: Path) -> _State:
        """Everything but the models' tensors. Nothing is changed yet: the reading may fail."""
        state = json.loads((folder / "state.json").read_bytes())
        step, extra, code = state["step"], state["extra"], state["code"]
        if type(step) is not int or not isinstance(extra, dict) or not isinstance(code, dict):
            raise ValueError("state.json holds no step, no state or no code")
        for name, model in self._models.items():
            with safe_open(folder / f"{name}.safetensors", "pt") as file:
                if set(file.keys()) != _state(model).keys():
                    raise ValueError(f"{name}.safetensors holds other tensors than the model")
        optimizers = {name: _read(folder / f"{name}.optimizer.pt") for name in self._optimizers}
        return _State(step, extra, code, optimizers, _read(folder / "rng.pt"))

    def _load(self, folder: Path, state: _State) -> Checkpoint:
        for name, model in self._models.items():
            # Not strict: tied parameters are stored once, frozen ones not at all.
            model.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=False)
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state.optimizers[name])
        _restore_rng(state.rng)
        return Checkpoint(folder, state.step, state.extra, tuple(changed_code(state.code)))

    def _found(self) -> list[Path]:
        return sorted(self._folder.glob("step-*")) if self._folder.is_dir() else []


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes; tied once, for safetensors refuses two names for one storage."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name not in frozen}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for name in sorted(state):
        tensor = state[name]
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen or tensor.numel() == 0:
            seen.add(key)
            kept[name] = tensor.contiguous()
    return kept


def _check_digests(folder: Path) -> None:
    """Raise `ValueError` unless the folder holds the files of its manifest, and nothing else."""
    digests = json.loads((folder / "manifest.json").read_bytes())
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    if not isinstance(digests, dict) or digests.keys() != names:
        raise ValueError("manifest.json does not name the files that are there")
    for name, expected in digests.items():
        if file_digest(folder / name) != expected:
            raise ValueError(f"{name} does not match its digest")


def _read(path: Path) -> dict[str, Any]:
    """Tensors and numbers of a file of torch's. Anything else in it is refused, and never run."""
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the unpickler raises whatever the bytes make it stumble over
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path.name} cannot be read: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path.name} holds a {type(state).__name__}")
    return state


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

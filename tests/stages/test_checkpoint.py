"""Checkpoints that somebody has tampered with: never unpickled, never half loaded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from infra.files import file_digest
from schemas.training import OptimizerConfig
from stages.checkpoint import Checkpoints
from stages.optimization import Optimizer


class Touch:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self._mark, "it ran")


def reseal(folder: Path) -> None:
    """Give a folder that was tampered with a manifest that agrees with it."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    digests = {path.name: file_digest(path) for path in files}
    (folder / "manifest.json").write_text(json.dumps(digests))


class House:
    """One linear layer whose only weight says how many steps it has taken."""

    def __init__(self, folder: Path) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        optimizer = Optimizer.create(self.model, OptimizerConfig(learning_rate=0.1), 10)
        self.optimizer = optimizer
        self.checkpoints = Checkpoints(folder, {"model": self.model}, {"model": optimizer})

    def save(self, step: int) -> None:
        nn.init.constant_(self.model.weight, float(step))
        self.checkpoints.save(step, {"position": step})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    house = House(folder)
    house.save(1)
    house.save(2)
    return folder


def pickled(name: str) -> Callable[[Path, Path], None]:
    def tamper(newest: Path, mark: Path) -> None:
        (newest / name).write_bytes(pickle.dumps(Touch(mark)))

    return tamper


def saved_by_torch(newest: Path, mark: Path) -> None:
    torch.save({"adamw": Touch(mark), "step_count": 2}, newest / "model.optimizer.pt")


def not_tensors(newest: Path, mark: Path) -> None:
    (newest / "model.safetensors").write_bytes(pickle.dumps(Touch(mark)))


def no_step(newest: Path, mark: Path) -> None:
    (newest / "state.json").write_text('{"step": "2", "extra": {}}')


def nested(newest: Path, mark: Path) -> None:
    (newest / "state.json").write_text("[" * 100_000)


def extra_file(newest: Path, mark: Path) -> None:
    (newest / "manifest.json").unlink()
    reseal(newest)
    (newest / "more.pt").write_bytes(b"x")


@pytest.mark.parametrize(
    "tamper",
    [
        pickled("model.optimizer.pt"),
        pickled("rng.pt"),
        saved_by_torch,
        not_tensors,
        no_step,
        nested,
    ],
)
def test_tampered_with_and_sealed_again_it_is_passed_over(
    folder: Path, tmp_path: Path, tamper: Callable[[Path, Path], None]
) -> None:
    mark = tmp_path / "mark"
    tamper(folder / "step-00000002", mark)
    reseal(folder / "step-00000002")
    house = House(folder)
    found = house.checkpoints.resume()
    assert found is not None and found.step == 1 and found.extra == {"position": 1}
    assert house.model.weight.item() == 1.0
    assert not mark.exists()


@pytest.mark.parametrize(
    "manifest", ["{}", "[]", "null", '{"../../x": "0"}', "[" * 100_000, "\udcff", ""]
)
def test_a_manifest_that_leaves_files_out_is_damage(folder: Path, manifest: str) -> None:
    path = folder / "step-00000002" / "manifest.json"
    path.write_bytes(manifest.encode("utf-8", "surrogateescape"))
    found = House(folder).checkpoints.resume()
    assert found is not None and found.step == 1


def test_a_file_that_the_manifest_does_not_name_is_damage(folder: Path, tmp_path: Path) -> None:
    extra_file(folder / "step-00000002", tmp_path / "mark")
    found = House(folder).checkpoints.resume()
    assert found is not None and found.step == 1


def test_with_none_left_nothing_is_touched(folder: Path, tmp_path: Path) -> None:
    for step in folder.iterdir():
        pickled("rng.pt")(step, tmp_path / "mark")
        reseal(step)
    house = House(folder)
    nn.init.constant_(house.model.weight, 7.0)
    random = torch.get_rng_state()
    assert house.checkpoints.resume() is None
    assert house.model.weight.item() == 7.0
    assert torch.equal(torch.get_rng_state(), random)
    assert not (tmp_path / "mark").exists()


def two_layers(folder: Path, *, frozen: bool) -> tuple[nn.Sequential, Checkpoints]:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].requires_grad_(not frozen)
    optimizer = Optimizer.create(model, OptimizerConfig(learning_rate=0.1), 10)
    return model, Checkpoints(folder, {"model": model}, {"model": optimizer})


def test_frozen_weights_are_left_out_and_stay(tmp_path: Path) -> None:
    model, checkpoints = two_layers(tmp_path, frozen=True)
    checkpoints.save(1, {})
    stored = load_file(tmp_path / "step-00000001" / "model.safetensors")
    assert stored.keys() == {"1.weight"}
    fresh, checkpoints = two_layers(tmp_path, frozen=True)
    before = fresh[0].weight.clone()
    assert checkpoints.resume() is not None
    assert torch.equal(fresh[0].weight, before)
    assert torch.equal(fresh[1].weight, model[1].weight)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_checkpoint_of_other_weights_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, frozen: bool
) -> None:
    _, checkpoints = two_layers(tmp_path, frozen=frozen)
    checkpoints.save(1, {})
    _, others = two_layers(tmp_path, frozen=not frozen)
    assert others.resume() is None
    assert "model.safetensors holds other tensors than the model" in caplog.text

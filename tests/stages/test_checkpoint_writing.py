"""What a checkpoint leaves on the disk when its writing fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from schemas.training import OptimizerConfig
from stages import checkpoint
from stages.checkpoint import Checkpoints
from stages.optimization import Optimizer


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = Optimizer.create(model, OptimizerConfig(learning_rate=0.1), 10)
    return Checkpoints(tmp_path / "checkpoints", {"model": model}, {"model": optimizer})


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_what_a_killed_process_left_is_removed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000001.4711").mkdir(parents=True)
    checkpoints.save(1, {})
    assert names(tmp_path) == {"step-00000001"}


def test_a_failed_write_gives_its_space_back_and_costs_no_older_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, {"cursor": 7})

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(2, {"cursor": 8})
    assert names(tmp_path) == {"step-00000001"}
    found = checkpoints.resume()
    assert found is not None
    assert (found.step, found.extra) == (1, {"cursor": 7})

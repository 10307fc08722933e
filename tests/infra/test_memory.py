"""What is left of a machine's memory, and of a container's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from infra import memory
from infra.memory import container_free_bytes, free_bytes


def version_2(root: Path, limit: str) -> Path:
    (root / "memory.max").write_text(f"{limit}\n", encoding="ascii")
    (root / "memory.current").write_text("700\n", encoding="ascii")
    stat = "anon 500\nfile 200\ninactive_file 150\nactive_file 50\n"
    (root / "memory.stat").write_text(stat, encoding="ascii")
    return root


def test_a_container_may_take_what_its_limit_leaves(tmp_path: Path) -> None:
    assert container_free_bytes(version_2(tmp_path, "1000")) == 1000 - 700 + 150


def test_a_container_above_its_limit_has_nothing(tmp_path: Path) -> None:
    assert container_free_bytes(version_2(tmp_path, "300")) == 0


def test_the_older_control_groups(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000\n", encoding="ascii")
    (folder / "memory.usage_in_bytes").write_text("400\n", encoding="ascii")
    stat = "inactive_file 1\ntotal_inactive_file 30\n"
    (folder / "memory.stat").write_text(stat, encoding="ascii")
    assert container_free_bytes(tmp_path) == 630


def test_without_a_limit_or_control_groups(tmp_path: Path) -> None:
    assert container_free_bytes(tmp_path / "none") is None
    assert container_free_bytes(version_2(tmp_path, "max")) is None


def test_the_smaller_of_machine_and_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_CGROUPS", version_2(tmp_path, "1000"))
    assert free_bytes(cpu) == 450
    monkeypatch.setattr(memory, "_CGROUPS", version_2(tmp_path, str(2**62)))
    assert 0 < free_bytes(cpu) <= psutil.virtual_memory().total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_torch_has_cached_is_free() -> None:
    cuda = torch.device("cuda")
    block = torch.zeros(2**28, dtype=torch.uint8, device=cuda)
    held = free_bytes(cuda)
    del block
    assert free_bytes(cuda) - held >= 2**28

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from infra.devices import configure_threads, deterministic, resolve_device
from schemas.base import UserError


@pytest.fixture(autouse=True)
def _settings_come_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "name", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, count: int, name: str, device: str) -> None:
    devices(monkeypatch, count)
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_an_absent_device_is_the_users_error(
    monkeypatch: pytest.MonkeyPatch, count: int, name: str
) -> None:
    devices(monkeypatch, count)
    with pytest.raises(UserError, match=f"{name}, but torch .* sees {count} CUDA devices; set"):
        resolve_device(name)


def test_a_word_that_is_no_device() -> None:
    with pytest.raises(UserError, match="'tpu9000' is not a device; use auto"):
        resolve_device("tpu9000")


def test_threads() -> None:
    configure_threads(1)
    assert torch.get_num_threads() == 1
    configure_threads(None)
    assert torch.get_num_threads() == 1


def test_deterministic() -> None:
    deterministic()
    assert torch.are_deterministic_algorithms_enabled()

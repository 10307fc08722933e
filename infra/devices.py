"""Which device a stage computes on, with how many threads, and how repeatably."""

from __future__ import annotations

import os

import torch

from schemas.base import UserError


def resolve_device(name: str) -> torch.device:
    """The device named `auto`, `cpu`, `cuda` or `cuda:N`; `auto` takes CUDA where there is one."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"compute.device {name!r} is not a device; use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(
            f"compute.device is {name}, but torch {torch.__version__} sees {available} CUDA "
            "devices; set compute.device to auto or cpu, or install a CUDA build of torch"
        )
    return device


def configure_threads(num_threads: int | None) -> None:
    """Threads of one operation on the CPU; None leaves torch's default, all cores."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def deterministic() -> None:
    """Make the same inputs give the same bits; an operation that cannot do so only warns."""
    # cuBLAS reads this when its first handle is made, so it must be set before any work.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False

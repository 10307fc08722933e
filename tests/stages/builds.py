"""Builds of the kernels, for tests that go through all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from stages.core import kernels

_CAPABILITY = torch.backends.cpu.get_cpu_capability()
BUILDS = {
    "_kernels": True,
    "_kernels_x86_64_v3": _CAPABILITY in ("AVX2", "AVX512"),
    "_kernels_x86_64_v4": _CAPABILITY == "AVX512",
    "_kernels_x86_64_v4_bf16": torch.cpu._is_avx512_bf16_supported(),
}
"""Which of them this processor runs."""


@contextmanager
def in_use(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let one build, or "torch" for none, serve; a test is skipped where it does not run."""
    if not BUILDS.get(name, True):
        pytest.skip(f"this processor has no {name}")
    if name == "torch":
        monkeypatch.setattr(kernels, "_functions", dict)
        yield
        return
    monkeypatch.setattr(kernels, "build", lambda: name)
    kernels._functions.cache_clear()
    assert kernels._functions(), "pip install --editable . builds them"
    yield
    kernels._functions.cache_clear()

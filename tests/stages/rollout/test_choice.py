"""Which engine `auto` means, and where."""

from __future__ import annotations

import pytest

from schemas.rl import RolloutConfig
from stages.rollout import choice
from stages.rollout.choice import choose_engine


@pytest.mark.parametrize(
    ("device", "installed", "while_training", "engine", "why"),
    [
        ("cpu", True, False, "native", "auto: the device is cpu"),
        ("cpu", False, True, "native", "auto: the device is cpu"),
        ("cuda", False, False, "native", "auto: the device is cuda, but vLLM is not installed"),
        ("cuda", True, False, "vllm", "auto: the device is cuda and vLLM is installed"),
        ("cuda", True, True, "vllm_server", "auto: the device is cuda and vLLM is installed"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    installed: bool,
    while_training: bool,
    engine: str,
    why: str,
) -> None:
    monkeypatch.setattr(choice, "vllm_is_installed", lambda: installed)
    config = RolloutConfig(engine="auto", max_batch_size=7)
    chosen, reason = choose_engine(config, device, while_training=while_training)
    assert (chosen.engine, reason) == (engine, why)
    assert chosen.max_batch_size == 7


@pytest.mark.parametrize("engine", ["native", "vllm", "vllm_server"])
def test_what_a_recipe_names_stays(engine: str) -> None:
    config = RolloutConfig.model_validate({"engine": engine})
    found = choose_engine(config, "cuda", while_training=False)
    assert found == (config, "the recipe asks for it")

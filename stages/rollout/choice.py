"""Which engine samples, where the recipe leaves it open; needs neither torch nor vLLM."""

from __future__ import annotations

import importlib.util

from schemas.rl import Engine, RolloutConfig


def choose_engine(
    config: RolloutConfig, device: str, *, while_training: bool
) -> tuple[RolloutConfig, str]:
    """The configuration with `auto` decided for this device (`cpu` or `cuda`), and why.

    To be called before a fingerprint is made: which engine samples changes what is drawn, so work
    that was done with one is not taken for work done with the other. `while_training`: sampling
    goes on while the policy trains.
    """
    if config.engine != "auto":
        return config, "the recipe asks for it"
    chosen: Engine
    if device != "cuda":
        chosen, why = "native", f"auto: the device is {device}"
    elif not vllm_is_installed():
        chosen, why = "native", "auto: the device is cuda, but vLLM is not installed"
    else:
        # In the stage's own process it would hold up the training.
        chosen = "vllm_server" if while_training else "vllm"
        why = "auto: the device is cuda and vLLM is installed"
    return config.model_copy(update={"engine": chosen}), why


def vllm_is_installed() -> bool:
    """Whether vLLM can be imported, by its name alone: importing it takes seconds."""
    return importlib.util.find_spec("vllm") is not None

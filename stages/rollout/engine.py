"""The engine that a recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from schemas.rl import RolloutConfig
from stages.rollout.native import NativeEngine
from stages.rollout.types import RolloutEngine


def build_engine(
    config: RolloutConfig,
    *,
    model: PreTrainedModel,
    model_folder: Path,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
) -> RolloutEngine:
    """The configured engine, at version 0 of the weights.

    `model` is the module that is sampled from, or trained; `model_folder` holds the same weights
    as a Hugging Face folder, which is where an engine with a copy of its own loads them from.
    """
    match config.engine:
        case "native":
            return NativeEngine(
                model,
                eos_token_ids=eos_token_ids,
                pad_token_id=pad_token_id,
                max_batch_size=config.max_batch_size,
            )
        case "vllm":
            # Loading vLLM takes seconds and may not be installed: only who asks for it pays.
            from stages.rollout.vllm_engine import VLLMEngine

            return VLLMEngine(
                model_folder,
                eos_token_ids=eos_token_ids,
                max_batch_size=config.max_batch_size,
            )

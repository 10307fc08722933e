"""What vLLM is told, in the stage's process and in a server alike; imports nothing of vLLM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from schemas.rl import SamplingConfig

SERVER_OPTIONS = (
    "--enable-scale-out",
    "--worker-extension-cls",
    "stages.rollout.vllm_engine.PolicyWorker",
    "--logprobs-mode",
    "raw_logprobs",
    "--generation-config",
    "vllm",
)
"""Options without which a server is none of ours, however it was started."""

# vLLM takes all the memory that it is not told to leave, and the trainer needs the rest.
_SHARE_OF_FREE_MEMORY = 0.25
# A sequence holds whole blocks of keys and values; blocks are at most this many tokens.
_BLOCK = 128


def sampling_params(sampling: SamplingConfig, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """vLLM's sampling parameters, but for the number of samples and the seed.

    The temperature is applied to the logits before, so that the log-probabilities that vLLM
    reports from before truncation are those of the trainer.
    """
    params: dict[str, Any] = {
        "temperature": 0.0 if sampling.temperature == 0 else 1.0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_completion_tokens,
        # Our end tokens are the only ones, whatever the model's folder says.
        "ignore_eos": True,
        "stop_token_ids": sorted({*eos_token_ids, *sampling.stop_token_ids}),
        "logprobs": 0,
        "detokenize": bool(sampling.stop),
    }
    return params | ({"stop": list(sampling.stop)} if sampling.stop else {})


def cache_room(
    config: PreTrainedConfig, max_batch_size: int, num_engines: int = 1
) -> tuple[int, int]:
    """Bytes for keys and values of one engine, and the longest sequence that fits in them."""
    text = config.get_text_config(decoder=True)
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * num_heads * head_dim * number_format(config).itemsize
    context: int = text.max_position_embeddings
    wanted = token * (context + _BLOCK) * max_batch_size
    size = min(wanted, int(_free_memory() * _SHARE_OF_FREE_MEMORY) // num_engines)
    return size, min(context, size // token - _BLOCK)


def folder_options(
    folder: Path, config: PreTrainedConfig, max_batch_size: int, num_servers: int
) -> tuple[list[str], int]:
    """Options of `vllm serve` for a model's folder, and the longest sequence that fits."""
    size, context = cache_room(config, max_batch_size, num_servers)
    options = [
        *("--model", str(folder)),
        *("--dtype", str(number_format(config)).removeprefix("torch.")),
        *("--max-model-len", str(context), "--max-num-seqs", str(max_batch_size)),
        *("--kv-cache-memory-bytes", str(size), "--seed", "0", "--disable-uvicorn-access-log"),
    ]
    if not torch.cuda.is_available():
        options.append("--enforce-eager")
    return options, context


def number_format(config: PreTrainedConfig) -> torch.dtype:
    """The number format that the folder was saved in."""
    dtype = config.dtype or torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


def _free_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

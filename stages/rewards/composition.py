"""From rollouts to rewards: each component by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infra.store import Store
from schemas.artifacts import ModelContract, RewardModelCheckpoint
from schemas.rewards import RewardConfig
from schemas.training import Precision
from stages.core.shaping import aggregate_steps, potential_based
from stages.forward import Sequences
from stages.models import check_contract
from stages.rewards.models import load_scorer, outcome_scores, step_scores
from stages.rewards.served import ServedModel, serve_model
from stages.rewards.verifiers import Verifier, build_verifier
from stages.rollout.types import Rollout
from stages.tokenization import StepFinder, completion_text


@dataclass(frozen=True)
class RewardBreakdown:
    """What the rollouts of a batch earned; tensors are on the CPU."""

    scores: Tensor
    """[_N]: weighted sum of the components that are credited to the whole response."""
    total: Tensor
    """[_N]: `scores`, plus the weighted aggregate of the step scores where steps are credited."""
    components: dict[str, Tensor]
    """[_N] each, unweighted: `verifier`, `outcome`, `process` (the aggregate)."""
    step_ends: list[Tensor] | None = None
    """Positions of each step's last token within the completion, [_S] a rollout."""
    step_scores: list[Tensor] | None = None
    """P(right) of each step."""
    step_rewards: list[Tensor] | None = None
    """Weighted rewards of the steps; None unless steps are credited by themselves."""


class Rewarder:
    """Scores rollouts with a verifier, an outcome model and a process model, as configured."""

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        verifier: Verifier | None,
        outcome: PreTrainedModel | ServedModel | None,
        process: PreTrainedModel | ServedModel | None,
        step_separator: str,
        max_tokens: int | None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._verifier = verifier
        self._outcome = outcome
        self._process = process
        self._find_steps = StepFinder(tokenizer, step_separator)
        self._max_tokens = max_tokens

    def __call__(
        self, rollouts: Sequence[Rollout], records: Sequence[dict[str, Any]]
    ) -> RewardBreakdown:
        """Rewards of rollouts; records are those of the prompts, by `prompt_index`."""
        sequences = Sequences(
            [rollout.prompt_ids for rollout in rollouts],
            [rollout.completion_ids for rollout in rollouts],
        )
        components: dict[str, Tensor] = {}
        scores = torch.zeros(len(rollouts))
        if self._verifier is not None and self._config.verifier is not None:
            components["verifier"] = self.verify(rollouts, records)
            scores = scores + self._config.verifier.weight * components["verifier"]
        if self._outcome is not None and self._config.outcome is not None:
            components["outcome"] = outcome_scores(self._outcome, sequences, self._max_tokens).cpu()
            scores = scores + self._config.outcome.weight * components["outcome"]
        if self._process is None or self._config.process is None:
            return RewardBreakdown(scores, scores, components)
        return self._with_steps(scores, components, sequences)

    def verify(self, rollouts: Sequence[Rollout], records: Sequence[dict[str, Any]]) -> Tensor:
        """What the verifier alone says, [_N] unweighted; there has to be one."""
        assert self._verifier is not None
        texts = [completion_text(self._tokenizer, r.completion_ids) for r in rollouts]
        answers = [str(records[rollout.prompt_index]["answer"]) for rollout in rollouts]
        return torch.tensor(self._verifier.score(texts, answers), dtype=torch.float32)

    def close(self) -> None:
        """End the processes of the verifier, and the servers of the models."""
        if self._verifier is not None:
            self._verifier.close()
        for model in (self._outcome, self._process):
            if isinstance(model, ServedModel):
                model.close()

    def _with_steps(
        self, scores: Tensor, components: dict[str, Tensor], sequences: Sequences
    ) -> RewardBreakdown:
        process = self._config.process
        assert process is not None and self._process is not None
        ends = [self._find_steps(completion) for completion in sequences.completion_ids]
        found = [own.cpu() for own in step_scores(self._process, sequences, ends, self._max_tokens)]
        # A response without a step has shown no work: it earns what a wrong step earns.
        aggregated = torch.stack(
            [
                aggregate_steps(own, process.aggregate) if own.numel() else torch.tensor(0.0)
                for own in found
            ]
        )
        components["process"] = aggregated
        total = scores + process.weight * aggregated
        step_ends = [torch.tensor(own, dtype=torch.long) for own in ends]
        if process.credit == "aggregate":
            return RewardBreakdown(total, total, components, step_ends, found)
        shaped = [potential_based(own) if process.potential_based else own for own in found]
        rewards = [process.weight * own for own in shaped]
        return RewardBreakdown(scores, total, components, step_ends, found, rewards)


def build_rewarder(
    config: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    contract: ModelContract,
    *,
    store: Store,
    outcome: RewardModelCheckpoint | None,
    process: RewardModelCheckpoint | None,
    step_separator: str,
    max_tokens: int | None,
    precision: Precision,
    device: torch.device,
) -> Rewarder:
    """Load what the configuration names. Raises UserError where a model does not fit the policy."""
    loaded: dict[str, PreTrainedModel | ServedModel | None] = {"outcome": None, "process": None}
    for name, checkpoint in (("outcome", outcome), ("process", process)):
        if getattr(config, name) is not None:
            assert checkpoint is not None and checkpoint.kind == name
            check_contract("the policy", contract, f"the {name} reward model", checkpoint.contract)
            folder = store.path(checkpoint)
            if config.engine == "vllm_server":
                loaded[name] = serve_model(folder, config.servers)
            else:
                loaded[name] = load_scorer(folder, name, device, precision)
    return Rewarder(
        config,
        tokenizer,
        verifier=build_verifier(config.verifier) if config.verifier is not None else None,
        outcome=loaded["outcome"],
        process=loaded["process"],
        step_separator=step_separator,
        max_tokens=max_tokens,
    )

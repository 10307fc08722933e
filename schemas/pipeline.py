"""The whole recipe, and every rule that crosses stages."""

from __future__ import annotations

from typing import Annotated, Literal, Self, cast

from pydantic import Field, model_validator

from schemas.base import Frozen
from schemas.data import DataConfig
from schemas.evaluation import EvaluateConfig, GateConfig, RegistryConfig, check_gate
from schemas.model import ModelConfig
from schemas.rewards import RewardConfig
from schemas.rl import RLConfig, RolloutConfig
from schemas.training import (
    LabelStepsConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SamplePreferencesConfig,
    SFTConfig,
)

Seconds = Annotated[float, Field(gt=0)]
StageName = Literal[
    "prepare_data",
    "train_sft",
    "sample_preferences",
    "label_steps",
    "train_reward_model",
    "train_process_reward_model",
    "train_rl",
    "credit",
    "evaluate",
]
"""Stages that run in a process of their own."""


class ComputeConfig(Frozen):
    """Where stages run. Nothing here enters a fingerprint."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` takes CUDA where there is one, else the CPU."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of a stage on the CPU; the default is all cores."""
    retries: int = Field(default=2, ge=0, le=10)
    """How often Prefect starts a stage again after an infrastructure failure."""
    stage_timeout: Seconds | dict[StageName, Seconds] | None = None
    """Seconds after which a stage is stopped and counted as failed: for all, or by stage."""
    hang_timeout: float | None = Field(default=3600.0, ge=60)
    """Seconds without any progress after which a stage counts as hung: the stacks of its threads
    go to its log, it is stopped and started again. A slow stage moves on and is left alone. The
    default is generous, for loading a large model or starting an engine tells of no progress."""
    registry_timeout: float = Field(default=300.0, ge=0)
    """Seconds that evaluation and promotion wait for an MLflow server that is away."""
    slot: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Prefect concurrency limit of which a stage that computes holds a slot: one a device."""

    def timeout_of(self, stage: str) -> float | None:
        """Seconds that a stage may take, or None for as long as it needs."""
        if isinstance(self.stage_timeout, dict):
            return self.stage_timeout.get(cast(StageName, stage))
        return self.stage_timeout


class PipelineConfig(Frozen):
    """One recipe: from data and a base model to a promoted model."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the recipe."""
    description: str = ""
    """What the recipe is for."""
    seed: int = Field(default=0, ge=0)
    """Seed of every stage."""
    model: ModelConfig
    """Base model."""
    data: DataConfig
    """Records."""
    sft: SFTConfig
    """Supervised fine-tuning."""
    sample_preferences: SamplePreferencesConfig | None = None
    """Draw preference pairs from the SFT policy."""
    label_steps: LabelStepsConfig | None = None
    """Draw step labels by Monte-Carlo continuation."""
    reward_model: RewardModelConfig | None = None
    """Outcome reward model."""
    process_reward_model: ProcessRewardModelConfig | None = None
    """Process reward model."""
    reward: RewardConfig
    """How rollouts are scored."""
    rollout: RolloutConfig = RolloutConfig()
    """The engine that samples."""
    rl: RLConfig
    """Reinforcement learning."""
    evaluation: EvaluateConfig
    """Held-out evaluation."""
    gate: GateConfig = GateConfig()
    """Promotion rule."""
    registry: RegistryConfig
    """Registered model."""
    compute: ComputeConfig = ComputeConfig()
    """Where stages run."""

    @model_validator(mode="after")
    def _check_reward_models(self) -> Self:
        if self.reward.outcome is not None and self.reward_model is None:
            raise ValueError(
                "reward.outcome needs a reward model: add section reward_model, "
                "or drop reward.outcome"
            )
        if self.reward.process is not None and self.process_reward_model is None:
            raise ValueError(
                "reward.process needs a process reward model: add section process_reward_model, "
                "or drop reward.process"
            )
        if self.reward_model is not None and self._pairs_missing():
            raise ValueError(
                "reward_model needs pairs: add data.preferences, or section sample_preferences"
            )
        if (
            self.process_reward_model is not None
            and self.data.step_labels is None
            and self.label_steps is None
        ):
            raise ValueError(
                "process_reward_model needs step labels: add data.step_labels, "
                "or section label_steps"
            )
        return self

    def _pairs_missing(self) -> bool:
        return self.data.preferences is None and self.sample_preferences is None

    @model_validator(mode="after")
    def _check_held_out(self) -> Self:
        if self.reward_model is not None and self.data.preferences_held_out is None:
            raise ValueError(
                "reward_model is evaluated on held-out pairs: add data.preferences_held_out"
            )
        if self.process_reward_model is not None and self.data.step_labels_held_out is None:
            raise ValueError(
                "process_reward_model is evaluated on held-out steps: add data.step_labels_held_out"
            )
        if self.reward.verifier is None:
            raise ValueError(
                "pass@1 on held-out records is measured by a verifier: add reward.verifier"
            )
        return self

    @model_validator(mode="after")
    def _check_rl(self) -> Self:
        dpo = self.rl.dpo
        if self.rl.algorithm == "dpo" and dpo is not None:
            if dpo.pairs == "data" and self.data.preferences is None:
                raise ValueError(
                    "rl.algorithm dpo learns from pairs: add data.preferences, "
                    "or set rl.dpo.pairs to sampled and add section sample_preferences"
                )
            if dpo.pairs == "sampled" and self.sample_preferences is None:
                raise ValueError("rl.dpo.pairs is sampled: add section sample_preferences")
        if self.rl.algorithm != "dpo" and self.data.prompts is None:
            raise ValueError(f"rl.algorithm {self.rl.algorithm} samples: add data.prompts")
        online = self.rl.online if self.rl.algorithm != "dpo" else None
        if online is not None and online.max_policy_lag and self.rollout.engine == "vllm":
            raise ValueError(
                "rl.online.max_policy_lag samples while the policy trains, and engine vllm is in "
                "the process that trains: set rollout.engine to vllm_server"
            )
        for name in ("sample_preferences", "label_steps"):
            if getattr(self, name) is not None and self.data.prompts is None:
                raise ValueError(f"{name} samples from data.prompts: add it")
        ranker = self.sample_preferences.ranker if self.sample_preferences else None
        if ranker == "outcome" and (self.reward_model is None or self.data.preferences is None):
            raise ValueError(
                "sample_preferences.ranker outcome needs a reward model trained on "
                "data.preferences: add both, or rank with the verifier"
            )
        return self

    @model_validator(mode="after")
    def _check_gate(self) -> Self:
        check_gate(self.gate, self.evaluation, self.reward)
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.model.built is None:
            return self
        limit = self.model.built.max_positions
        lengths = {
            "sft.max_length": self.sft.max_length,
            "evaluation.sampling.max_completion_tokens": (
                self.evaluation.sampling.max_completion_tokens
            ),
        }
        for name in ("reward_model", "process_reward_model"):
            section = getattr(self, name)
            if section is not None:
                lengths[f"{name}.max_length"] = section.max_length
        if self.rl.online is not None:
            lengths["rl.online.sampling.max_completion_tokens"] = (
                self.rl.online.sampling.max_completion_tokens
            )
        if self.rl.dpo is not None:
            lengths["rl.dpo.max_length"] = self.rl.dpo.max_length
        for name, length in lengths.items():
            if length > limit:
                raise ValueError(
                    f"{name} is {length}, but the model's context holds {limit} tokens: "
                    f"lower it, or raise model.built.max_positions"
                )
        return self

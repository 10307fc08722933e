"""What a stage is asked to do: its configuration, its input artifacts, and where it runs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter

from schemas.artifacts import (
    Approval,
    DatasetArtifact,
    EvaluationReport,
    PolicyCheckpoint,
    RewardModelCheckpoint,
)
from schemas.base import Frozen
from schemas.data import DataSource, Layout, SplitName
from schemas.evaluation import EvaluateConfig, GateConfig, RegistryConfig
from schemas.model import ModelConfig
from schemas.rewards import RewardConfig, VerifierConfig
from schemas.rl import RLConfig, RolloutConfig, SamplingConfig
from schemas.training import (
    LabelStepsConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SamplePreferencesConfig,
    SFTConfig,
)


class Runtime(Frozen):
    """Where a stage runs. Left out of the fingerprint by construction."""

    store: str
    """Root folder of the store."""
    data_root: str = "."
    """Folder that relative data paths start from."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    num_threads: int | None = None
    """Threads on the CPU."""
    engine_reason: str = ""
    """Why the stage samples with the engine that it was given."""
    mlflow_run_id: str | None = None
    """The nested MLflow run that the artifact belongs to."""


class StageRequest(Frozen):
    """What every request carries. `VERSION` is raised by hand when a stage's results change."""

    VERSION: ClassVar[int] = 1
    fingerprint: str = ""
    """Filled in by the caller; names the work and its folder."""
    runtime: Runtime
    sources: dict[str, str] = Field(default_factory=dict)
    """Digests of the user's functions and data files by name: part of the fingerprint."""


class PrepareDataRequest(StageRequest):
    stage: Literal["prepare_data"] = "prepare_data"
    split: SplitName
    layout: Layout
    source: DataSource
    evaluation: DatasetArtifact | None = None
    """Held-out records that this split must share no prompt with."""
    training: tuple[DatasetArtifact, ...] = ()
    """Training splits that a held-out split must share no prompt with."""


class TrainSFTRequest(StageRequest):
    stage: Literal["train_sft"] = "train_sft"
    seed: int
    model: ModelConfig
    config: SFTConfig
    demonstrations: DatasetArtifact


class SamplePreferencesRequest(StageRequest):
    stage: Literal["sample_preferences"] = "sample_preferences"
    seed: int
    config: SamplePreferencesConfig
    sampling: SamplingConfig
    rollout: RolloutConfig
    policy: PolicyCheckpoint
    prompts: DatasetArtifact
    verifier: VerifierConfig
    reward_model: RewardModelCheckpoint | None = None


class LabelStepsRequest(StageRequest):
    stage: Literal["label_steps"] = "label_steps"
    seed: int
    config: LabelStepsConfig
    sampling: SamplingConfig
    rollout: RolloutConfig
    step_separator: str
    policy: PolicyCheckpoint
    prompts: DatasetArtifact
    verifier: VerifierConfig


class TrainRewardModelRequest(StageRequest):
    stage: Literal["train_reward_model"] = "train_reward_model"
    seed: int
    config: RewardModelConfig
    policy: PolicyCheckpoint
    preferences: tuple[DatasetArtifact, ...]
    held_out: DatasetArtifact


class TrainProcessRewardModelRequest(StageRequest):
    stage: Literal["train_process_reward_model"] = "train_process_reward_model"
    seed: int
    config: ProcessRewardModelConfig
    step_separator: str
    policy: PolicyCheckpoint
    step_labels: tuple[DatasetArtifact, ...]
    held_out: DatasetArtifact


class TrainRLRequest(StageRequest):
    stage: Literal["train_rl"] = "train_rl"
    seed: int
    config: RLConfig
    policy: PolicyCheckpoint
    """The SFT policy: where training starts, and the reference."""
    reward: RewardConfig | None = None
    """None for DPO."""
    rollout: RolloutConfig | None = None
    step_separator: str = "\n"
    prompts: DatasetArtifact | None = None
    preferences: DatasetArtifact | None = None
    reward_model: RewardModelCheckpoint | None = None
    process_reward_model: RewardModelCheckpoint | None = None


class CreditRequest(StageRequest):
    stage: Literal["credit"] = "credit"
    config: RLConfig
    """How the policy was trained: the estimators take their settings from it."""
    policy: PolicyCheckpoint
    """Trained online; its traces are read."""


class EvaluateRequest(StageRequest):
    VERSION: ClassVar[int] = 2
    stage: Literal["evaluate"] = "evaluate"
    seed: int
    config: EvaluateConfig
    reward: RewardConfig
    rollout: RolloutConfig
    step_separator: str
    records: DatasetArtifact
    candidate: PolicyCheckpoint
    baseline: PolicyCheckpoint
    incumbent: PolicyCheckpoint | None = None
    """The champion of the registry; None where there is none yet."""
    reward_model: RewardModelCheckpoint | None = None
    process_reward_model: RewardModelCheckpoint | None = None


class PromoteRequest(StageRequest):
    """Judged in the flow, beside the registry; it has no child process."""

    VERSION: ClassVar[int] = 2
    stage: Literal["promote"] = "promote"
    gate: GateConfig
    registry: RegistryConfig
    candidate: PolicyCheckpoint
    report: EvaluationReport
    evaluation: DatasetArtifact
    """Records of the evaluation, with the fields that slices are named by."""
    training: tuple[DatasetArtifact, ...]
    """Every split that a model of this run was trained on."""
    approval: Approval | None = None
    """What a person said to the decision on the rest of this request."""


AnyRequest = Annotated[
    PrepareDataRequest
    | TrainSFTRequest
    | SamplePreferencesRequest
    | LabelStepsRequest
    | TrainRewardModelRequest
    | TrainProcessRewardModelRequest
    | TrainRLRequest
    | CreditRequest
    | EvaluateRequest,
    Field(discriminator="stage"),
]
request_adapter: TypeAdapter[AnyRequest] = TypeAdapter(AnyRequest)

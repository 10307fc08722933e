"""What passes between stages: frozen, typed, without tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from schemas.base import Frozen
from schemas.data import Layout, SplitName
from schemas.rl import Algorithm

EVALUATION_RECORDS_FILE = "records.parquet"
"""One row for each model, record and sample of an evaluation."""


TRACES_FILE = "credit/traces.parquet"
"""In a policy of online RL: traced rollouts, one row a token, all that credit saw."""
TRACE_METRICS_KEY = "posttrain.metrics"
"""Key of the traces' schema metadata: the metrics of every traced step, as JSON."""

CREDIT_TABLE_FILE = "credit.parquet"
"""The traces with a column for each estimator."""
CREDIT_SUMMARY_FILE = "credit.json"
"""What the estimators have in common, and how many steps responses had over training."""
CREDIT_PREFIX = "credit/"
"""Before the name of an estimator, its column in the table."""


class CreatedBy(Frozen):
    """The code and packages that made an artifact."""

    posttrain: str
    """Version of this distribution."""
    python: str
    """Version of the interpreter."""
    packages: dict[str, str]
    """Versions of the packages that decide the numbers."""
    code: dict[str, str]
    """Digest of the syntax tree (no comments, no docstrings) of each of our modules that ran."""


class Artifact(Frozen):
    """What every artifact carries."""

    uri: str
    """Folder of the content, relative to the store's root, so that a store can be moved."""
    sha256: str
    """Digest of the manifest: names and digests of all the files of the content."""
    fingerprint: str
    """What the work was: stage, version, configuration, inputs, user functions."""
    parents: tuple[str, ...] = ()
    """Fingerprints of the inputs."""
    mlflow_run_id: str | None = None
    """The nested MLflow run of the stage."""
    created_by: CreatedBy
    """Code and packages."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Final numbers of the stage."""


class ModelContract(Frozen):
    """What the next stage must agree on with this model."""

    tokenizer_sha256: str
    """Digest of the tokenizer's vocabulary, merges, normalisation and special tokens."""
    chat_template_sha256: str | None
    """Digest of the chat template, or None where there is none."""
    pad_token_id: int
    """Id that fills rows; it may equal the end id."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a completion."""
    architecture: str
    """Class of the causal model, such as LlamaForCausalLM."""
    vocab_size: int
    """Rows of the embedding."""
    max_positions: int
    """Context length in tokens."""
    dtype: str
    """Number format of the saved parameters."""


class DatasetArtifact(Artifact):
    """Validated records of one split: `records.jsonl`, one record a line, each with its `id`."""

    type: Literal["dataset"] = "dataset"
    split: SplitName
    layout: Layout
    num_records: int
    num_prompts: int
    """Distinct prompts."""


class PolicyCheckpoint(Artifact):
    """A causal language model and its tokenizer: a plain Hugging Face folder."""

    type: Literal["policy"] = "policy"
    algorithm: Literal["sft"] | Algorithm
    contract: ModelContract
    num_parameters: int
    num_steps: int
    """Optimizer steps that were taken."""


class RewardModelCheckpoint(Artifact):
    """A reward model and its tokenizer: a plain Hugging Face folder."""

    type: Literal["reward_model"] = "reward_model"
    kind: Literal["outcome", "process"]
    contract: ModelContract
    pooling: Literal["last_token", "step_end"]
    """Where a score is read: last non-padding token (from the mask), or last token of a step."""
    step_separator: str | None = None
    """Text that ends a step; only for `kind: process`."""
    num_parameters: int
    num_steps: int


class CreditReport(Artifact):
    """The traced rollouts of a run under every estimator: `credit.parquet`, `credit.json`."""

    type: Literal["credit"] = "credit"
    num_rollouts: int
    steps: tuple[int, ...]
    """Steps of the run that were traced."""
    estimators: tuple[str, ...]
    """Those that this run's traces suffice for."""


class ModelScores(Frozen):
    """One model on the held-out records."""

    sha256: str
    """The model's content digest."""
    num_records: int
    num_samples: int
    """Completions of each record."""
    pass_at: dict[str, float]
    """`pass@k` for each k, unbiased (Chen et al. 2021)."""
    reward: float
    """Mean composed reward (the verifier's where nothing else is configured)."""
    kl: float
    """Mean sequence KL to the SFT policy in nats, k1 on the model's own samples."""
    length: float
    """Mean completion length in tokens."""
    truncated_fraction: float
    """Share of the completions that were cut."""
    components: dict[str, float] = Field(default_factory=dict)
    """Mean of each reward component, unweighted (`verifier`, `outcome`, `process`), and `proxy`:
    the weighted sum of the trained ones, where there is one."""

    def metrics(self) -> dict[str, float]:
        """Every metric by the name that the gate knows it by."""
        return {
            **self.pass_at,
            "reward": self.reward,
            "kl": self.kl,
            "length": self.length,
            "truncated_fraction": self.truncated_fraction,
            **self.components,
        }


class EvaluationReport(Artifact):
    """Candidate, baseline and incumbent; `records.parquet` holds every record of each."""

    type: Literal["evaluation"] = "evaluation"
    candidate: ModelScores
    baseline: ModelScores
    incumbent: ModelScores
    incumbent_is_baseline: bool
    """True for the first model of a registered name: the SFT policy is the incumbent."""


class GateCheck(Frozen):
    """One rule of the gate and the numbers it was judged on."""

    rule: str
    """Name of the field of the gate, with the metric or the slice in brackets."""
    passed: bool
    observed: float | None
    """The number that was judged; None where there was nothing to measure, which `reason` says."""
    required: float
    """Its limit."""
    reason: str
    """One sentence for a person."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """Everything else that was used: means, the bootstrap's settings and bound, counts."""


class Approval(Frozen):
    """What a person said about a candidate that passed the gate."""

    granted: bool
    """True to promote it, False to refuse it."""
    by: str = Field(min_length=1)
    """Who said so."""
    reason: str = Field(min_length=1)
    """Why."""
    when: str
    """When, in UTC, as in `2026-01-31T02:00:00Z`."""
    decision: str
    """Fingerprint of the decision that waited: no other one is meant."""


class PromotionDecision(Artifact):
    """What the gate said, and what the registry did."""

    type: Literal["decision"] = "decision"
    promoted: bool
    awaiting_approval: bool = False
    """True if every check holds and a person has yet to agree."""
    approval: Approval | None = None
    """What a person said, where the gate asks for it."""
    registered_model: str
    version: str
    """Version in the registry."""
    aliases: tuple[str, ...]
    """Aliases that the version holds after the decision."""
    checks: tuple[GateCheck, ...]
    reasons: tuple[str, ...]
    """Why it was promoted or refused, one sentence each."""

    @property
    def outcome(self) -> str:
        """One word or two: `promoted`, `awaiting approval`, or who refused it."""
        if self.promoted:
            return "promoted"
        if self.awaiting_approval:
            return "awaiting approval"
        return f"refused by {self.approval.by}" if self.approval else "refused by the gate"


AnyArtifact = Annotated[
    DatasetArtifact
    | PolicyCheckpoint
    | RewardModelCheckpoint
    | CreditReport
    | EvaluationReport
    | PromotionDecision,
    Field(discriminator="type"),
]
artifact_adapter: TypeAdapter[AnyArtifact] = TypeAdapter(AnyArtifact)

"""Optimisation settings and the configurations of the supervised stages."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.base import Frozen

Precision = Literal["float32", "bfloat16"]


class OptimizerConfig(Frozen):
    """AdamW with a warm-up and a schedule."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moment estimates."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the optimizer steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up: cosine to `min_learning_rate_ratio`, or constant."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""


class LoRAConfig(Frozen):
    """Low-rank adapters (peft); they are merged into the weights when the stage ends."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the update, divided by the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, in training."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter; embedding and output head cannot."""


class GradientNormConfig(Frozen):
    """When a gradient counts as exploding. Clipping tames most; this is for steps not to be taken.

    At least one of `max` and `max_ratio` is set.
    """

    max: float | None = Field(default=None, gt=0)
    """Largest global norm, before clipping."""
    max_ratio: float | None = Field(default=None, gt=1)
    """Largest global norm as a multiple of the median over the last `window` steps taken."""
    window: int = Field(default=50, ge=2)
    """Steps that the median is over; until as many were taken, `max_ratio` is not looked at."""
    action: Literal["stop", "skip", "rewind"] = "skip"
    """What is done about such a step."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max is None and self.max_ratio is None:
            raise ValueError("a limit for the gradient norm is missing: set max or max_ratio")
        return self


class StabilityConfig(Frozen):
    """What is done when training goes wrong, case by case.

    `stop`: the stage fails, and says at which step, on which records, and what helps.
    `skip`: the optimizer step is left out; the weights stay as they were, the schedule moves on.
    `rewind`: weights, optimizer and random numbers go back to the last checkpoint; the records
    since then are left out (Chowdhery et al. 2022, PaLM, section 5.1) and the learning rate is
    multiplied by `rewind_learning_rate_factor`, so that the same failure does not come again.
    """

    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient that is NaN or infinite. Weights that are not finite cannot be skipped:
    there, `skip` stops."""
    grad_norm: GradientNormConfig | None = None
    """A gradient norm that is far too large; None leaves it to clipping."""
    max_interventions: int = Field(default=3, ge=1)
    """Skips and rewinds together, after which the next failure stops the stage."""
    rewind_learning_rate_factor: float = Field(default=0.5, gt=0, le=1)
    """Each rewind multiplies the learning rate by this, until the end of the stage."""

    @property
    def rewinds(self) -> bool:
        """Whether any case goes back to a checkpoint."""
        by_norm = self.grad_norm is not None and self.grad_norm.action == "rewind"
        return self.non_finite == "rewind" or by_norm


class SupervisedConfig(Frozen):
    """What the stages that learn from fixed records share: SFT, reward models, DPO."""

    optimizer: OptimizerConfig
    """Optimiser and schedule."""
    num_epochs: float = Field(default=1.0, gt=0)
    """Passes over the records."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps, whichever comes first."""
    batch_size: int = Field(default=32, ge=1)
    """Records (pairs for a reward model and DPO) in one optimizer step, over all ranks."""
    max_length: int = Field(ge=8)
    """Longest sequence in tokens; longer ones are cut, counted and reported."""
    micro_batch_tokens: int | None = Field(default=None, ge=8)
    """Most tokens that go through the model at once, as many as serve the model best unless given;
    fewer where measured memory does not hold them."""
    precision: Precision = "float32"
    """Number format of the matrix products; weights and optimizer state stay in float32."""
    gradient_checkpointing: bool = False
    """Keep the input of each layer alone, and compute the layer again in the backward pass: less
    memory for a fifth to a third more time. Results are the same, so it enters no fingerprint."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between logged metrics."""
    max_truncated_fraction: float = Field(default=0.1, ge=0, le=1)
    """The stage stops before training if a larger share of the records had to be cut."""
    stability: StabilityConfig = StabilityConfig()
    """What is done about losses and gradients that would ruin the model."""

    def content(self) -> dict[str, object]:
        """What enters a fingerprint."""
        return self.model_dump(mode="json", exclude={"gradient_checkpointing"})


class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on completion tokens."""

    lora: LoRAConfig | None = None
    """Train low-rank adapters in place of all the weights."""


class RewardModelConfig(SupervisedConfig):
    """Outcome reward model: Bradley-Terry on preference pairs."""

    margin: float = Field(default=0.0, ge=0)
    """Subtracted from the score difference inside the sigmoid."""
    centering: float = Field(default=0.0, ge=0)
    """Weight of `(r_chosen + r_rejected)^2`, which keeps scores around 0."""


class ProcessRewardModelConfig(SupervisedConfig):
    """Process reward model: right or wrong at the last token of each step."""


class SamplePreferencesConfig(Frozen):
    """Pairs drawn from the SFT policy."""

    num_prompts: int = Field(ge=1)
    """Prompts to sample from, the first ones of `data.prompts`."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """Completions drawn for each prompt."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """At most this many pairs are kept for a prompt."""
    ranker: Literal["verifier", "outcome"] = "verifier"
    """What tells chosen from rejected."""
    min_gap: float = Field(default=0.5, ge=0)
    """Smallest score difference that makes a pair."""


class LabelStepsConfig(Frozen):
    """Step labels by Monte-Carlo continuation (Math-Shepherd, Wang et al. 2024, section 3.3)."""

    num_prompts: int = Field(ge=1)
    """Prompts to sample a solution for, the first ones of `data.prompts`."""
    solutions_per_prompt: int = Field(default=1, ge=1)
    """Solutions drawn for each prompt."""
    continuations_per_step: int = Field(default=4, ge=1)
    """Completions drawn from each prefix; a step is right if enough of them reach the answer."""
    threshold: float = Field(default=0.0, ge=0, lt=1)
    """A step is right if more than this share of its continuations is right (0: hard estimate)."""

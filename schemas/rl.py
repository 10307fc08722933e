"""The reinforcement-learning stage: one section shared by the online algorithms, one for each."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.base import Frozen
from schemas.training import (
    LoRAConfig,
    OptimizerConfig,
    Precision,
    StabilityConfig,
    SupervisedConfig,
)

Algorithm = Literal["ppo", "grpo", "rloo", "dpo"]
LossAggregation = Literal["token_mean", "sequence_mean", "constant"]


class SamplingConfig(Frozen):
    """How completions are drawn. Temperature is applied on both sides, engine and trainer."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 means greedy (evaluation only)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus: the smallest set of tokens with at least this probability."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest, before top-k and top-p."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A completion ends with the token in which one of these texts ends; the token is kept."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Tokens that end a completion, beside the model's own end tokens."""
    max_completion_tokens: int = Field(ge=1)
    """Longest completion; one that reaches it without an end token is truncated."""


class ServersConfig(Frozen):
    """Servers of vLLM. Nothing here enters a fingerprint."""

    count: int = Field(default=1, ge=1, le=64)
    """Servers that the stage starts, each a replica in processes of its own."""
    urls: tuple[Annotated[str, Field(pattern=r"^http://[^/\s]+$")], ...] = ()
    """Servers that run already, in place of `count`: `http://host:port`."""
    weights_folder: str | None = None
    """Folder that the servers in `urls` can read: new weights go there."""
    start_timeout: float = Field(default=600.0, gt=0)
    """Seconds that a server may take to answer after its start, or to load weights."""
    stall_timeout: float = Field(default=120.0, gt=0)
    """Seconds without a new token after which a server that has work counts as hung."""
    slow_after: float = Field(default=300.0, gt=0)
    """Seconds after which a request is given to an idle server too; the first answer counts."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a server is started again before the stage goes on without it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.urls and self.weights_folder is None:
            raise ValueError(
                "servers named by urls read new weights from a folder: add servers.weights_folder"
            )
        if self.weights_folder is not None and not self.urls:
            raise ValueError("servers.weights_folder is for servers named by servers.urls: drop it")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("servers.urls names a server twice")
        return self


Engine = Literal["native", "vllm", "vllm_server", "auto"]


class RolloutConfig(Frozen):
    """The engine that samples."""

    engine: Engine = "native"
    """`native`: batched KV-cache sampling in torch. `vllm`: vLLM in the stage's process.
    `vllm_server`: servers of vLLM. `auto`: vLLM where it is installed and the device is CUDA,
    native otherwise; decided before the fingerprint, since the engine changes what is drawn."""
    max_batch_size: int = Field(default=512, ge=1)
    """Most completions that are decoded at once, in each server."""
    precision: Precision = "float32"
    """Number format where a stage only samples; while it trains, `rl.online.precision` holds."""
    servers: ServersConfig = ServersConfig()
    """Servers of `vllm_server`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.servers.urls and self.engine != "vllm_server":
            raise ValueError(
                f"servers.urls names servers, but engine is {self.engine}: set it to vllm_server"
            )
        return self

    def content(self) -> dict[str, object]:
        """What enters a fingerprint."""
        return {
            "engine": self.engine,
            "max_batch_size": self.max_batch_size,
            "precision": self.precision,
        }


class TraceConfig(Frozen):
    """Rollouts that are kept, token by token, with everything credit saw."""

    num_groups: int = Field(default=2, ge=0)
    """Whole groups that are kept: the first ones of the rollout batch. 0 turns it off."""
    every: int = Field(default=10, ge=1)
    """Rollout batches from one kept to the next; the first and the last are always kept."""


class HeldOutConfig(Frozen):
    """A probe for reward hacking: prompts of `data.prompts` that this stage never trains on.

    They are chosen by the digest of the prompt, and have nothing to do with `data.evaluation`,
    which the gate alone looks at; stages before this one may have seen them. Each check answers
    them greedily once, and the verifier judges. The case is met when in each of the last `patience`
    checks the accuracy is more than `min_drop` below the best one, while the training reward over
    them is above the one then.
    """

    num_prompts: int = Field(default=64, ge=1)
    """Prompts that are held out."""
    every: int = Field(default=10, ge=1)
    """Rollout batches from one check to the next."""
    patience: int = Field(default=3, ge=1)
    """Checks in a row that must show it."""
    min_drop: float = Field(default=0.02, ge=0, lt=1)
    """Loss of accuracy that counts."""
    action: Literal["stop", "rewind"] = "stop"
    """`rewind` goes back to the step of the best accuracy."""


class OnlineStabilityConfig(StabilityConfig):
    """What is done when online training goes wrong, case by case."""

    kl: Literal["stop", "rewind"] = "stop"
    """The KL to the SFT policy is above `max_kl`."""
    entropy: Literal["stop", "rewind"] = "stop"
    """The entropy is below `min_entropy`."""
    held_out: HeldOutConfig | None = None
    """The training reward rises while held-out accuracy falls; None: not looked at, no prompt is
    held out and no time is spent."""

    @property
    def rewinds(self) -> bool:
        """Whether any case goes back to a checkpoint."""
        by_probe = self.held_out is not None and self.held_out.action == "rewind"
        return super().rewinds or "rewind" in (self.kl, self.entropy) or by_probe


class OnlineConfig(Frozen):
    """What PPO, GRPO and RLOO share."""

    num_steps: int = Field(default=50, ge=1)
    """Rollout batches."""
    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts in a rollout batch."""
    group_size: int = Field(default=8, ge=1)
    """Completions drawn for each prompt."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over a rollout batch."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimizer steps in one pass over a rollout batch."""
    micro_batch_tokens: int | None = Field(default=None, ge=8)
    """Most tokens that go through the model at once, as many as serve the model best unless given;
    fewer where measured memory does not hold them."""
    precision: Precision = "float32"
    """Number format of the matrix products, sampling's too; weights stay in float32."""
    gradient_checkpointing: bool = False
    """Policy and critic keep the input of each layer alone, and compute the layer again in the
    backward pass: less memory for about a third more time in the update. Results are the same, so
    it enters no fingerprint."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters in place of all the weights; without them the policy is the SFT
    policy, so no second model is loaded as the reference. Of a critic, `separate` still trains all
    its weights, `shared` its head and, with the policy, the adapters."""
    sampling: SamplingConfig
    """How rollouts are drawn."""
    overlong_buffer: int = Field(default=0, ge=0)
    """DAPO's soft penalty grows over the last tokens before the limit; 0 turns it off."""
    overlong_weight: float = Field(default=1.0, ge=0)
    """Weight of the soft penalty."""
    mask_truncated: bool = False
    """Leave completions that were cut out of the loss."""
    mismatch_cap: float = Field(default=2.0, gt=0)
    """Cap of the importance weight between trainer and engine."""
    mismatch_level: Literal["token", "sequence"] = "token"
    """Importance weight of each token, or of the whole completion for all its tokens."""
    max_mismatch_kl: float = Field(default=0.5, gt=0)
    """The stage stops when the engine's distribution is further than this from the trainer's."""
    max_policy_lag: int = Field(default=0, ge=0, le=1)
    """1: the next rollout batch is drawn while the policy trains on this one, by the weights of
    before this update (of which the native engine holds a copy). 0: by the newest weights, one
    after the other."""
    max_truncated_fraction: float = Field(default=0.9, gt=0, le=1)
    """The stage stops when a larger share of a rollout batch was cut."""
    max_zero_variance_fraction: float = Field(default=1.0, gt=0, le=1)
    """Without a critic, the stage stops when this share of the groups of the last `patience` steps
    had no variance: they teach nothing."""
    patience: int = Field(default=20, ge=1)
    """Steps over which `max_zero_variance_fraction` is measured."""
    max_kl: float | None = Field(default=None, gt=0)
    """Limit of the mean sequence KL to the SFT policy, in nats, for `stability.kl`; or None."""
    min_entropy: float | None = Field(default=None, gt=0)
    """Floor of the mean entropy of a token, in nats, for `stability.entropy`; or None."""
    stability: OnlineStabilityConfig = OnlineStabilityConfig()
    """What is done when training goes wrong."""
    trace: TraceConfig = TraceConfig()
    """Rollouts that are kept to look at credit."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Rollout batches between checkpoints."""

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                f"lora.dropout is {self.lora.dropout:g}, but with dropout the policy that trains "
                "is not the one that sampled, and no ratio between them is right: set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_stability(self) -> Self:
        for case, limit in (("kl", "max_kl"), ("entropy", "min_entropy")):
            if getattr(self.stability, case) == "rewind" and getattr(self, limit) is None:
                raise ValueError(f"stability.{case} is rewind, but no limit is set: add {limit}")
        if self.max_policy_lag and (self.stability.rewinds or self.stability.held_out):
            raise ValueError(
                "max_policy_lag 1 draws a batch that a rewind would have to take back, and keeps "
                "the engine from the held-out probe: set it to 0, or stability to stop or skip "
                "and stability.held_out to null"
            )
        return self


class PPOConfig(Frozen):
    """Proximal policy optimisation (Schulman et al. 2017) with a learned critic."""

    optimizer: OptimizerConfig
    """The policy's optimiser."""
    critic: Literal["separate", "shared"] = "separate"
    """`separate`: a model of its own, from the SFT policy. `shared`: a value head on the policy's
    backbone, which then also learns from the value loss; no second model in memory."""
    critic_optimizer: OptimizerConfig
    """The critic's optimiser; with `critic: shared` it moves the value head, and the policy's
    moves the backbone."""
    value_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss beside the policy's, where both train one backbone
    (`critic: shared`)."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """Rollout batches on which only the critic is trained; of a shared one, only its head."""
    critic_min_explained_variance: float = Field(default=0.2, le=1)
    """With `credit: auto`, token-level credit is used above this explained variance."""
    credit: Literal["token", "response", "auto"] = "auto"
    """`token`: GAE. `response`: score less a baseline, the same for every token."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of a token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Bias against variance in GAE."""
    bootstrap_truncated: bool = False
    """Use the critic's value after the last token of a completion that was cut."""
    whiten_advantages: bool = True
    """Advantages of a rollout batch get mean 0 and variance 1."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of negative advantages (Ye et al. 2020), or None."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """Values move at most this far from the old ones, or None."""
    kl_coef: float = Field(default=0.02, ge=0)
    """Weight of the per-token KL penalty in the reward."""
    kl_target: float | None = Field(default=None, gt=0)
    """Sequence KL in nats that the adaptive controller aims at; None keeps `kl_coef` fixed."""
    kl_horizon: int = Field(default=10000, ge=1)
    """Completions over which the adaptive controller reacts."""
    aggregation: LossAggregation = "token_mean"
    """What the loss is a mean over."""


class GRPOConfig(Frozen):
    """Group relative policy optimisation (Shao et al. 2024, DeepSeekMath)."""

    optimizer: OptimizerConfig
    """The policy's optimiser."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the group, of the batch, or not (Dr. GRPO)."""
    eps: float = Field(default=1e-4, ge=0)
    """Added to the standard deviation."""
    ratio: Literal["token", "sequence_mean"] = "token"
    """Importance ratio by token, or by length-normalised sequence (GSPO)."""
    loss: Literal["clip", "cispo"] = "clip"
    """Clipped surrogate, or clipped importance weights (CISPO)."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.28, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL to the SFT policy."""
    kl_in: Literal["loss", "reward"] = "loss"
    """k3 in the loss (DeepSeekMath), or k1 in the reward."""
    dynamic_sampling_rounds: int = Field(default=0, ge=0)
    """Groups without variance are drawn again from new prompts, at most this many times (DAPO)."""
    aggregation: LossAggregation = "token_mean"
    """What the loss is a mean over."""


class RLOOConfig(Frozen):
    """REINFORCE leave-one-out (Ahmadian et al. 2024)."""

    optimizer: OptimizerConfig
    """The policy's optimiser."""
    ratio: Literal["token", "sequence"] = "sequence"
    """Importance ratio of a token or of the whole completion."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(default=0.02, ge=0)
    """Weight of the sequence KL (k1) in the reward."""
    aggregation: LossAggregation = "sequence_mean"
    """What the loss is a mean over."""


class DPOConfig(SupervisedConfig):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference policy."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Which function of the margin is minimised."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Chance that a label is wrong (conservative DPO); for the sigmoid loss only."""
    length_normalized: bool = False
    """Use the mean logprob of a token in place of the sum."""
    nll_coef: float = Field(default=0.0, ge=0)
    """Weight of the chosen completion's negative log-likelihood (Pang et al. 2024)."""
    pairs: Literal["data", "sampled"] = "data"
    """Pairs from `data.preferences`, or from `sample_preferences`."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters in place of all the weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError("label_smoothing is defined for loss: sigmoid only; set it to 0")
        return self


class RLConfig(Frozen):
    """The RL stage. Only the chosen algorithm's section matters, and only it is fingerprinted."""

    algorithm: Algorithm = "grpo"
    """Which algorithm runs."""
    online: OnlineConfig | None = None
    """Sampling and batching of PPO, GRPO and RLOO."""
    ppo: PPOConfig | None = None
    """Settings of PPO."""
    grpo: GRPOConfig | None = None
    """Settings of GRPO."""
    rloo: RLOOConfig | None = None
    """Settings of RLOO."""
    dpo: DPOConfig | None = None
    """Settings of DPO."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if getattr(self, self.algorithm) is None:
            raise ValueError(
                f"algorithm is {self.algorithm}, but section rl.{self.algorithm} is missing; add it"
            )
        if self.algorithm == "dpo":
            return self
        if self.online is None:
            raise ValueError(f"{self.algorithm} samples; add section rl.online")
        if self.algorithm in ("grpo", "rloo") and self.online.group_size < 2:
            raise ValueError(
                f"{self.algorithm} compares the completions of one prompt: "
                f"rl.online.group_size must be at least 2, not {self.online.group_size}"
            )
        if self.online.sampling.temperature == 0:
            raise ValueError("online RL cannot explore greedily: set a temperature above 0")
        if self.online.prompts_per_step % self.online.num_mini_batches:
            raise ValueError("rl.online.prompts_per_step must be a multiple of num_mini_batches")
        return self

    def chosen(self) -> RLConfig:
        """The same configuration with the sections that this algorithm never reads left out."""
        keep: dict[str, object] = {
            "algorithm": self.algorithm,
            self.algorithm: getattr(self, self.algorithm),
        }
        if self.algorithm != "dpo":
            keep["online"] = self.online
        return RLConfig.model_validate(keep)

    def content(self) -> dict[str, object]:
        """What enters a fingerprint."""
        same_results = {"gradient_checkpointing"}
        return self.model_dump(mode="json", exclude={"online": same_results, "dpo": same_results})

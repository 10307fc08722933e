"""Evaluation and the gate that a model has to pass."""

from __future__ import annotations

import difflib
from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.base import Frozen
from schemas.rewards import RewardConfig
from schemas.rl import SamplingConfig

LOWER_IS_BETTER = frozenset({"kl", "length", "truncated_fraction"})
"""Reported metrics of which less is better; of all others more is."""


class EvaluateConfig(Frozen):
    """Candidate, SFT baseline and incumbent on the same held-out records."""

    sampling: SamplingConfig
    """How completions are drawn; the same for every model."""
    num_samples: int = Field(default=4, ge=1)
    """Completions of each record."""
    pass_at: tuple[int, ...] = (1,)
    """The k of each pass@k; 1 must be among them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 1 not in self.pass_at:
            raise ValueError("evaluation.pass_at must contain 1: the gate is judged on pass@1")
        if max(self.pass_at) > self.num_samples:
            raise ValueError(
                f"pass@{max(self.pass_at)} needs at least as many samples a record; "
                f"evaluation.num_samples is {self.num_samples}"
            )
        if self.sampling.temperature == 0 and self.num_samples > 1:
            raise ValueError("greedy samples are all alike: set num_samples to 1, or a temperature")
        return self


class MetricLimit(Frozen):
    """Limits of one reported metric; at least one of them."""

    metric: str
    """`pass@k`, `reward`, `kl`, `length`, `truncated_fraction`, `verifier`, `outcome`, `process`
    or `proxy`, as far as the evaluation reports it (means over records)."""
    min: float | None = None
    """Floor of the candidate's mean."""
    max: float | None = None
    """Ceiling of the candidate's mean."""
    max_regression: float | None = Field(default=None, ge=0)
    """How much worse than the incumbent the candidate may be, at the gate's confidence by the
    paired bootstrap. Worse is more for kl, length and truncated_fraction, and less for the rest."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min is None and self.max is None and self.max_regression is None:
            raise ValueError(
                f"a limit of {self.metric} needs at least one of min, max and max_regression"
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"a limit of {self.metric} has min {self.min} above max {self.max}")
        return self


class SliceConfig(Frozen):
    """A field of the evaluation records' metadata whose every value is judged by itself.

    A candidate has to pass on every slice, so each is judged at the gate's confidence without a
    correction for their number (an intersection-union test: Berger 1982).
    """

    field: str = Field(min_length=1)
    """Field of a record's metadata, such as `level`; text, whole numbers or booleans."""
    values: tuple[str | int, ...] = ()
    """Slices that there must be, each with at least `min_records` records; by default every value
    with that many is judged, and the decision says which ones are smaller."""
    min_records: int = Field(default=20, ge=1)
    """Records that a slice needs to be judged."""
    min_primary: float | None = None
    """Floor of the candidate's primary metric on each slice."""
    max_regression: float | None = Field(default=None, ge=0)
    """How much of the primary metric may be lost to the incumbent on each slice, at the gate's
    confidence by the paired bootstrap over the slice's records."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_primary is None and self.max_regression is None:
            raise ValueError(
                f"slice {self.field} needs at least one of min_primary and max_regression"
            )
        return self


class RewardHackingConfig(Frozen):
    """The trained reward models (the proxy) against the verifier (the gold standard).

    The proxy of a completion is the weighted sum of the outcome and process components; gold is
    whether the verifier finds it right (Gao, Schulman and Hilton 2023).
    """

    max_gold_loss: float = Field(default=0.0, ge=0)
    """Where the mean proxy rose over the SFT baseline's: how much pass@1 may have fallen, at the
    gate's confidence by the paired bootstrap."""
    min_correlation: float | None = Field(default=None, ge=-1, le=1)
    """Floor of the correlation of proxy and gold over the candidate's completions."""


class ContaminationConfig(Frozen):
    """Evaluation prompts that the model was trained on."""

    max_shared_prompts: int = Field(default=0, ge=0)
    """Evaluation prompts that may also be in a training split, by the prompt's digest."""
    max_near_duplicates: int | None = Field(default=None, ge=0)
    """Evaluation prompts that may share `ngram` words in a row with a training record; None looks
    for exact prompts only. Words that many evaluation prompts share are template text and do not
    count; prompts of fewer words cannot be looked for, and the decision says how many they are."""
    ngram: int = Field(default=13, ge=5)
    """Words in a row (Brown et al. 2020, appendix C)."""


class GateConfig(Frozen):
    """What a candidate must show before it becomes the champion."""

    min_improvement: float = 0.0
    """Least gain in the primary metric (mean over records, in points of 1) over the incumbent."""
    primary_metric: Literal["pass@1", "reward"] = "pass@1"
    """Per-record metric that is compared."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided confidence of the paired bootstrap bound."""
    num_resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples."""
    max_kl: float | None = Field(default=None, gt=0)
    """Ceiling of the candidate's sequence KL to the SFT policy, in nats."""
    max_length_ratio: float | None = Field(default=None, gt=0)
    """Ceiling of the candidate's mean length over the incumbent's."""
    max_truncated_fraction: float | None = Field(default=None, ge=0, le=1)
    """Ceiling of the share of the candidate's completions that were cut."""
    min_primary: float | None = None
    """Floor of the candidate's primary metric."""
    limits: tuple[MetricLimit, ...] = ()
    """Floors, ceilings and largest regressions of any reported metric."""
    slices: tuple[SliceConfig, ...] = ()
    """Fields of the records whose every value must hold by itself."""
    reward_hacking: RewardHackingConfig | None = None
    """Proxy against gold reward; needs a trained reward model in the reward."""
    contamination: ContaminationConfig = ContaminationConfig()
    """Evaluation prompts among the training data."""
    approval: bool = False
    """A candidate that passes waits for a person: `posttrain promote NAME@VERSION --approve`, or
    the form of the suspended Prefect run."""


def reported_metrics(evaluation: EvaluateConfig, reward: RewardConfig) -> tuple[str, ...]:
    """Names of the metrics that an evaluation reports of each model."""
    names = [f"pass@{k}" for k in evaluation.pass_at]
    names += ["reward", "kl", "length", "truncated_fraction"]
    names += [name for name in ("verifier", "outcome", "process") if getattr(reward, name)]
    if reward.outcome is not None or reward.process is not None:
        names.append("proxy")
    return tuple(names)


def check_gate(gate: GateConfig, evaluation: EvaluateConfig, reward: RewardConfig) -> None:
    """Raise `ValueError` where a gate asks for a number that the evaluation does not report."""
    known = reported_metrics(evaluation, reward)
    for index, limit in enumerate(gate.limits):
        if limit.metric not in known:
            nearest = difflib.get_close_matches(limit.metric, known, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise ValueError(
                f"gate.limits.{index}.metric: the evaluation reports no metric {limit.metric}; "
                f"{hint}It reports {', '.join(known)}"
            )
    if gate.reward_hacking is not None and "proxy" not in known:
        raise ValueError(
            "gate.reward_hacking compares a trained reward model with the verifier: "
            "add reward.outcome or reward.process, or drop gate.reward_hacking"
        )


class RegistryConfig(Frozen):
    """Where the model is registered."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the registered model."""

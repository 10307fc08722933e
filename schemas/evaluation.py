"""Evaluation and the gate that a model has to pass."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.base import Frozen
from schemas.rl import SamplingConfig


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


class RegistryConfig(Frozen):
    """Where the model is registered."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the registered model."""

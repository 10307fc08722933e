"""How a rollout is scored."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from schemas.base import Frozen
from schemas.rl import ServersConfig

Aggregate = Literal["min", "product", "mean", "last"]


class VerifierConfig(Frozen):
    """A function `(completion, answer) -> float` named by import path, or a built-in one."""

    function: str
    """`module:function`, or `math_verify` (math-verify), or `reasoning_gym:DATASET`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments of the function."""
    weight: float = Field(default=1.0, gt=0)
    """Weight in the sum of the components."""


class OutcomeRewardConfig(Frozen):
    """The trained outcome reward model as a component."""

    weight: float = Field(default=1.0, gt=0)
    """Weight in the sum of the components."""


class ProcessRewardConfig(Frozen):
    """The trained process reward model as a component."""

    weight: float = Field(default=1.0, gt=0)
    """Weight in the sum of the components."""
    credit: Literal["aggregate", "steps"] = "steps"
    """`steps`: a reward at the end of each step; `aggregate`: one number for the response."""
    aggregate: Aggregate = "min"
    """How step scores become one number (always reported; credited where `credit` says so)."""
    potential_based: bool = False
    """Step rewards are differences of step scores, so that more steps earn nothing by themselves
    (Ng, Harada and Russell 1999)."""


class RewardConfig(Frozen):
    """Components and their weights."""

    verifier: VerifierConfig | None = None
    """Checks the answer; also what held-out accuracy is measured with."""
    outcome: OutcomeRewardConfig | None = None
    """Outcome reward model."""
    process: ProcessRewardConfig | None = None
    """Process reward model."""
    engine: Literal["torch", "vllm_server"] = "torch"
    """Where reward models score: `torch`, in the stage's process, or servers of vLLM."""
    servers: ServersConfig = ServersConfig()
    """Servers of each reward model with `vllm_server`; the stage starts them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.verifier is None and self.outcome is None and self.process is None:
            raise ValueError("reward needs at least one of verifier, outcome and process")
        if self.servers.urls:
            raise ValueError("reward models are served by the stage itself: drop servers.urls")
        return self

    def content(self) -> dict[str, Any]:
        """What enters a fingerprint."""
        return self.model_dump(mode="json", exclude={"servers"})

"""What is done when training goes wrong: stop, skip the step, or go back to a good checkpoint."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from schemas.base import UserError
from schemas.rl import OnlineStabilityConfig
from schemas.training import StabilityConfig

logger = logging.getLogger(__name__)

Case = Literal["non_finite", "grad_norm", "kl", "entropy", "held_out"]
Action = Literal["skip", "rewind"]

_SHOWN = 8
"""Records that a message names; the audit names all."""


class Unstable(ArithmeticError):
    """A step of training must not stand. Its text says what was seen and what the limit is."""

    def __init__(
        self,
        case: Case,
        text: str,
        *,
        value: float,
        limit: float | None,
        remedy: str,
        skippable: bool = True,
    ) -> None:
        super().__init__(text)
        self.case: Case = case
        self.value = value
        self.limit = limit
        self.remedy = remedy
        self.skippable = skippable
        """False where the weights are ruined already."""
        self.records: list[str] | None = None
        """Ids of the part of the step's batch that it was met on; None: the whole batch."""


@dataclass
class Stability:
    """Judges losses and gradients, decides by the policy of each case, and keeps count.

    A checkpoint keeps its state; what it has decided is therefore decided again by a resumed
    stage, without being met again.
    """

    config: StabilityConfig
    section: str
    """Place of the configuration in the recipe, for messages."""
    interventions: list[dict[str, Any]] = field(default_factory=list)
    """What was done: step, case, action, value, limit, records, learning_rate_scale."""
    grad_norms: list[float] = field(default_factory=list)
    """Of the last `window` steps taken."""
    learning_rate_scale: float = 1.0
    """What the rewinds have made of the learning rate."""

    def check_loss(self, loss: float) -> None:
        """Raise Unstable for a loss that is not finite: before its gradient reaches anything."""
        if not math.isfinite(loss):
            raise Unstable(
                "non_finite",
                f"the loss is {loss}",
                value=loss,
                limit=None,
                remedy="look at the records, lower the learning rate, or set "
                f"{self.section}.non_finite to skip or rewind",
            )

    def check_grad_norm(self, norm: float, whose: str = "") -> None:
        """Raise Unstable for a gradient norm that is not finite or beyond the limits.

        whose: name of a model beside the one that the stage is about; its norm need only be finite.
        """
        name = f"{whose} gradient norm".strip()
        if not math.isfinite(norm):
            raise Unstable(
                "non_finite",
                f"the {name} is {norm}",
                value=norm,
                limit=None,
                remedy="look at the records, lower the learning rate, or set "
                f"{self.section}.non_finite to skip or rewind",
            )
        config = self.config.grad_norm
        if config is None or whose:
            return
        limits = [] if config.max is None else [(config.max, "grad_norm.max")]
        if config.max_ratio is not None and len(self.grad_norms) == config.window:
            median = statistics.median(self.grad_norms)
            limits.append(
                (
                    config.max_ratio * median,
                    f"grad_norm.max_ratio {config.max_ratio:g} times the median {median:.4g}",
                )
            )
        for limit, what in limits:
            if norm > limit:
                raise Unstable(
                    "grad_norm",
                    f"the {name} is {norm:.4g}, above {limit:.4g} ({self.section}.{what})",
                    value=norm,
                    limit=limit,
                    remedy="look at the records, lower the learning rate, or raise the limit",
                )
        self.grad_norms.append(norm)
        del self.grad_norms[: -config.window]

    def intervene(self, problem: Unstable, *, step: int, records: Sequence[str]) -> Action:
        """What to do about a problem; counted and said.

        step: number of the step, from 1. records: ids of its batch.
        Raises UserError where the policy is to stop, or was followed too often.
        """
        where = f"step {step}: {problem}{_listed(records)}"
        action = self.action(problem)
        if action == "skip" and not problem.skippable:
            raise UserError(
                f"{where}: {self.section}.{problem.case} is skip, but weights that are ruined "
                f"cannot be skipped: set it to rewind, or lower the learning rate"
            ) from problem
        if action == "stop":
            raise UserError(f"{where}: {problem.remedy}") from problem
        if len(self.interventions) >= self.config.max_interventions:
            raise UserError(
                f"{where}; {len(self.interventions)} times before, a step was left out or taken "
                f"back, and {self.section}.max_interventions allows no more: {problem.remedy}"
            ) from problem
        if action == "rewind":
            self.learning_rate_scale *= self.config.rewind_learning_rate_factor
        self.interventions.append(
            {
                "step": step,
                "case": problem.case,
                "action": action,
                # JSON has no NaN and no infinity.
                "value": problem.value if math.isfinite(problem.value) else str(problem.value),
                "limit": problem.limit,
                "records": list(records),
                "learning_rate_scale": self.learning_rate_scale,
            }
        )
        if action == "skip":
            logger.warning("%s: left out (intervention %s)", where, self._count())
        return action

    def rewound(self, step: int, target: int, problem: Unstable, records: Sequence[str]) -> None:
        """Say that training has gone back to step `target`."""
        logger.warning(
            "step %d: %s%s: back to step %d; the records since then are left out, and from here "
            "on the learning rate is multiplied by %g (intervention %s)",
            step,
            problem,
            _listed(records),
            target,
            self.learning_rate_scale,
            self._count(),
        )

    def metrics(self) -> dict[str, float]:
        """Counts for the curves; empty where no policy but `stop` is set."""
        if not self.may_intervene:
            return {}
        actions = [one["action"] for one in self.interventions]
        return {
            "stability/num_skipped": float(actions.count("skip")),
            "stability/num_rewinds": float(actions.count("rewind")),
        }

    @property
    def may_intervene(self) -> bool:
        """Whether any case does anything but stop."""
        by_norm = self.config.grad_norm is not None and self.config.grad_norm.action == "skip"
        return self.config.rewinds or self.config.non_finite == "skip" or by_norm

    def state_dict(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        return {
            "interventions": self.interventions,
            "grad_norms": self.grad_norms,
            "learning_rate_scale": self.learning_rate_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.interventions = list(state["interventions"])
        self.grad_norms = list(state["grad_norms"])
        self.learning_rate_scale = state["learning_rate_scale"]

    def go_back(self, state: dict[str, Any]) -> None:
        """Take the norms from a checkpoint; what was decided since then stays."""
        self.grad_norms = list(state["grad_norms"])

    def action(self, problem: Unstable) -> Literal["stop", "skip", "rewind"]:
        """What the configuration says about a problem."""
        config, case = self.config, problem.case
        if case == "non_finite":
            return config.non_finite
        if case == "grad_norm":
            assert config.grad_norm is not None
            return config.grad_norm.action
        assert isinstance(config, OnlineStabilityConfig)
        if case == "held_out":
            assert config.held_out is not None
            return config.held_out.action
        return config.kl if case == "kl" else config.entropy

    def _count(self) -> str:
        return f"{len(self.interventions)} of at most {self.config.max_interventions}"


def write_audit(content: Path, audit: Mapping[str, Any]) -> None:
    """Leave what a stage says about its own work beside the model, as `posttrain.json`."""
    text = json.dumps(audit, indent=2, sort_keys=True)
    (content / "posttrain.json").write_text(text + "\n", encoding="utf-8")


def _listed(records: Sequence[str]) -> str:
    if not records:
        return ""
    shown = ", ".join(records[:_SHOWN])
    more = f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else ""
    return f" (records {shown}{more})"

"""How one number is held against one limit."""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.artifacts import GateCheck
from schemas.evaluation import GateConfig
from stages.core.metrics import paired_bootstrap

BOOTSTRAP_SEED = 0


Numbers = dict[str, float]


def ceiling(
    rule: str, observed: float, limit: float, head: str, numbers: Numbers | None = None
) -> GateCheck:
    """At most `limit`; head: how the reason begins, such as "0.300 nats of KL"."""
    passed = observed <= limit
    return GateCheck(
        rule=rule,
        passed=passed,
        observed=observed,
        required=limit,
        reason=f"{head}, {'within' if passed else 'above'} the limit of {_shown(limit)}",
        numbers=numbers or {},
    )


def floor(
    rule: str, observed: float, limit: float, head: str, numbers: Numbers | None = None
) -> GateCheck:
    """At least `limit`; head: how the reason begins."""
    passed = observed >= limit
    return GateCheck(
        rule=rule,
        passed=passed,
        observed=observed,
        required=limit,
        reason=f"{head}, {'at or above' if passed else 'below'} the floor of {_shown(limit)}",
        numbers=numbers or {},
    )


def bounded_loss(
    rule: str,
    gains: Tensor,
    max_loss: float,
    gate: GateConfig,
    what: str,
    numbers: Numbers | None = None,
) -> GateCheck:
    """A loss of at most `max_loss`: a non-inferiority test on the bootstrap's lower bound.

    gains [_N]: of each record, positive where the candidate is better.
    """
    lower, used = bootstrap(gains, gate)
    passed = lower >= -max_loss
    return GateCheck(
        rule=rule,
        passed=passed,
        observed=lower,
        required=0.0 - max_loss,  # never -0.0
        reason=(
            f"{what} {'loses no more than' if passed else 'may lose more than'} {max_loss:.3f}: "
            f"mean gain {used['mean']:+.3f}, {gate.confidence:.0%} lower bound {lower:+.3f} "
            f"over {gains.numel()} records"
        ),
        numbers={**(numbers or {}), **used},
    )


def bootstrap(gains: Tensor, gate: GateConfig) -> tuple[float, Numbers]:
    """The lower bound of the mean gain, and every number that it was made with."""
    mean, lower = paired_bootstrap(gains, gate.confidence, gate.num_resamples, BOOTSTRAP_SEED)
    return lower, {
        "mean": mean,
        "lower_bound": lower,
        "confidence": gate.confidence,
        "num_resamples": float(gate.num_resamples),
        "seed": float(BOOTSTRAP_SEED),
        "num_records": float(gains.numel()),
    }


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two rows of numbers, both [_N]; 0 where one does not vary."""
    x, y = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = torch.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def _shown(limit: float) -> str:
    """A limit as it was written, cut to a few digits."""
    return f"{limit:.6g}"

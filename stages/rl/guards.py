"""Failures that would be silent: each is found by a number, and named with its remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from schemas.base import UserError
from schemas.rl import OnlineConfig
from stages.rl.rollouts import ScoredRollouts
from stages.stability import Unstable


@dataclass
class Guards:
    """Looks at the metrics of every step."""

    config: OnlineConfig
    compares_groups: bool
    """Whether a group without variance teaches nothing: where there is no critic."""
    flat_fractions: list[float] = field(default_factory=list)
    """`groups/zero_variance_fraction` of the last `patience` steps; a checkpoint keeps it."""

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raise Unstable where the KL or the entropy passes its limit.

        Raises UserError where most groups have had no variance for a while.
        """
        config = self.config
        self.flat_fractions.append(metrics["groups/zero_variance_fraction"])
        del self.flat_fractions[: -config.patience]
        flat = sum(self.flat_fractions) / len(self.flat_fractions)
        if (
            self.compares_groups
            and len(self.flat_fractions) == config.patience
            and flat >= config.max_zero_variance_fraction
        ):
            raise UserError(
                f"{flat:.0%} of the groups of the last {config.patience} steps had no variance in "
                "their rewards, and such groups teach nothing; "
                "rl.online.max_zero_variance_fraction is "
                f"{config.max_zero_variance_fraction:.0%}: use prompts that are neither too hard "
                "nor too easy, raise group_size or the temperature, or reward steps"
            )
        if config.max_kl is not None and metrics["kl/mean"] > config.max_kl:
            raise Unstable(
                "kl",
                f"the policy is {metrics['kl/mean']:.2f} nats a sequence away from the SFT policy, "
                f"above rl.online.max_kl {config.max_kl}",
                value=metrics["kl/mean"],
                limit=config.max_kl,
                remedy="raise kl_coef, lower the learning rate, or stop earlier (num_steps)",
            )
        # While a critic warms up, the policy makes no step and nothing measures its entropy.
        entropy = metrics.get("entropy")
        if config.min_entropy is not None and entropy is not None and entropy < config.min_entropy:
            raise Unstable(
                "entropy",
                f"the policy's entropy fell to {entropy:.4f} nats a token, "
                f"below rl.online.min_entropy {config.min_entropy}",
                value=entropy,
                limit=config.min_entropy,
                remedy="it no longer explores; lower the learning rate, raise clip_high or "
                "kl_coef, or stop earlier (num_steps)",
            )


def refuse_truncation(found: ScoredRollouts, config: OnlineConfig) -> None:
    """Raise UserError where too large a share of a rollout batch was cut."""
    cut = sum(rollout.truncated for rollout in found.rollouts)
    share = cut / len(found.rollouts)
    if share > config.max_truncated_fraction:
        limit = config.sampling.max_completion_tokens
        raise UserError(
            f"{cut} of {len(found.rollouts)} completions ({share:.0%}) reached the limit of "
            f"{limit} tokens; rl.online.max_truncated_fraction allows "
            f"{config.max_truncated_fraction:.0%}: raise max_completion_tokens, set "
            "overlong_buffer, or teach the end token in SFT"
        )

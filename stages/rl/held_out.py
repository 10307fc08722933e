"""A probe for reward hacking: accuracy on prompts that the stage never trains on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.base import UserError
from schemas.records import prompt_digest
from schemas.rl import HeldOutConfig, OnlineConfig
from stages import heartbeat
from stages.rewards.composition import Rewarder
from stages.rl.rollouts import PromptRecord
from stages.rollout.types import RolloutEngine
from stages.stability import Unstable

logger = logging.getLogger(__name__)

_ROUNDING = 1e-9
"""A drop of exactly `min_drop` does not count, whatever the last bits of a difference say."""


def split_held_out(
    prompts: Sequence[PromptRecord], config: HeldOutConfig | None
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """(prompts to train on, prompts of the probe).

    The probe gets the `num_prompts` distinct prompts of the lowest digests, one record each;
    further records of theirs are trained on by nobody.
    Raises UserError where nothing is left to train on.
    """
    if config is None:
        return list(prompts), []
    digests = [prompt_digest(prompt.record["prompt"]) for prompt in prompts]
    chosen = set(sorted(set(digests))[: config.num_prompts])
    rest = [p for p, digest in zip(prompts, digests, strict=True) if digest not in chosen]
    if not rest:
        raise UserError(
            f"rl.online.stability.held_out.num_prompts is {config.num_prompts}, but data.prompts "
            f"has {len(set(digests))} distinct prompts, so none is left to train on: lower it"
        )
    probe = {d: p for p, d in zip(prompts, digests, strict=True) if d in chosen}
    return rest, [probe[digest] for digest in sorted(probe)]


@dataclass
class HeldOutProbe:
    """Looks at held-out accuracy every few steps, beside the reward of the same weights."""

    engine: RolloutEngine
    rewarder: Rewarder
    prompts: Sequence[PromptRecord]
    config: OnlineConfig
    checks: list[dict[str, Any]] = field(default_factory=list)
    """step, accuracy, and the reward of the rollout batch drawn from the same weights (None until
    it is drawn). A checkpoint keeps them."""

    def due(self, step: int) -> bool:
        """Whether the weights after `step` steps are to be looked at, and have not been."""
        held_out = self.config.stability.held_out
        return held_out is not None and step % held_out.every == 0 and not self._looked_at(step)

    def look(self, step: int) -> None:
        """Measure the accuracy, greedily."""
        heartbeat.beat(f"answering {len(self.prompts)} held-out prompts after step {step}")
        rollouts = self.engine.generate(
            [prompt.prompt_ids for prompt in self.prompts],
            self.config.sampling.model_copy(update={"temperature": 0.0}),
            num_samples=1,
            seed=0,
        )
        found = self.rewarder.verify(rollouts, [prompt.record for prompt in self.prompts])
        accuracy = int((found == 1.0).sum()) / len(self.prompts)
        self.checks.append({"step": step, "accuracy": accuracy, "reward": None})
        logger.info("held-out accuracy after step %d: %.3f", step, accuracy)

    def metrics(self, step: int) -> dict[str, float]:
        """The accuracy, if the weights after `step` steps were looked at."""
        return {"held_out/accuracy": self.checks[-1]["accuracy"]} if self._looked_at(step) else {}

    def check(self, step: int, reward: float) -> None:
        """Note the reward that the same weights earned in training.

        Raises Unstable where the accuracy has fallen while the reward rose.
        """
        held_out = self.config.stability.held_out
        if held_out is None or not self._looked_at(step):
            return
        self.checks[-1]["reward"] = reward
        best, recent = self.best, self.checks[-held_out.patience :]
        reward_now = sum(check["reward"] for check in recent) / len(recent)
        drop = held_out.min_drop + _ROUNDING
        fallen = all(best["accuracy"] - check["accuracy"] > drop for check in recent)
        if len(recent) == held_out.patience and fallen and reward_now > best["reward"]:
            raise Unstable(
                "held_out",
                f"held-out accuracy was below {best['accuracy']:.3f} (after step {best['step']}) "
                f"by more than {held_out.min_drop:g} in the last {held_out.patience} checks, and "
                f"is {self.checks[-1]['accuracy']:.3f}, while the training reward rose from "
                f"{best['reward']:.3f} to {reward_now:.3f}",
                value=self.checks[-1]["accuracy"],
                limit=best["accuracy"] - held_out.min_drop,
                remedy="the reward is being exploited: mend it, raise kl_coef, or stop earlier "
                "(num_steps)",
            )

    @property
    def best(self) -> dict[str, Any]:
        """The check of the highest accuracy, the newest of equals."""
        return max(self.checks, key=lambda check: (check["accuracy"], check["step"]))

    @property
    def best_step(self) -> int | None:
        """Step of the best check, if there is one and training may go back to it."""
        held_out = self.config.stability.held_out
        if held_out is None or held_out.action != "rewind" or not self.checks:
            return None
        return int(self.best["step"])

    def _looked_at(self, step: int) -> bool:
        return bool(self.checks) and self.checks[-1]["step"] == step

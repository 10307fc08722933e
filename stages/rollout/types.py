"""What an engine gives back, and what an engine is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedModel

from schemas.rl import SamplingConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, in token ids: text is never tokenised a second time."""

    prompt_ids: list[int]
    completion_ids: list[int]
    """Where `finish_reason` is "stop", the last of them is an end token, or ends a stop string."""
    rollout_logprobs: list[float]
    """Of each completion token under softmax(logits / temperature) of the whole vocabulary.

    That is before min-p, top-k and top-p cut the distribution, as the trainer computes its own. A
    greedy completion (temperature 0) carries those of temperature 1.
    """
    finish_reason: FinishReason
    policy_version: int
    """Version of the weights that every token of it was drawn with."""
    prompt_index: int
    """Position of the prompt in the call; the completions that share it are a group."""

    @property
    def truncated(self) -> bool:
        """Whether the length limit cut it."""
        return self.finish_reason == "length"


class RolloutEngine(Protocol):
    """Samples completions of token-id prompts with the newest weights it was given."""

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        num_samples: int,
        seed: int,
    ) -> list[Rollout]:
        """Draw `num_samples` completions of every prompt, those of the first prompt first.

        The same weights, arguments and seed give the same rollouts. Callers vary the seed from
        batch to batch, and from rank to rank.
        """
        ...

    def update_weights(self, policy: PreTrainedModel, version: int) -> None:
        """Sample from the weights of `policy` from now on, and stamp rollouts with `version`."""
        ...

    def report(self) -> dict[str, float]:
        """Metrics of the faults that it has survived so far; none where it survives none."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; it cannot be used afterwards."""
        ...

"""The SFT policy with everything that sampling from it takes, for the stages that make data."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from infra.devices import resolve_device
from infra.store import Store
from schemas.artifacts import RewardModelCheckpoint
from schemas.requests import LabelStepsRequest, SamplePreferencesRequest
from schemas.rewards import RewardConfig
from stages.data.records import read_records
from stages.models import load_policy, load_tokenizer
from stages.precision import use_precision
from stages.rewards.composition import build_rewarder
from stages.rl.rollouts import PromptRecord
from stages.rollout.engine import build_engine
from stages.rollout.types import Rollout
from stages.tokenization import completion_text, encode_prompt


class PolicySampler:
    """A policy, an engine, a rewarder and prompts; a context manager that ends their processes."""

    def __init__(
        self,
        request: SamplePreferencesRequest | LabelStepsRequest,
        store: Store,
        reward: RewardConfig,
        *,
        outcome: RewardModelCheckpoint | None = None,
        step_separator: str = "\n",
    ) -> None:
        folder = store.path(request.policy)
        self.tokenizer = load_tokenizer(folder)
        self._sampling = request.sampling
        model = load_policy(folder, resolve_device(request.runtime.device)).eval()
        use_precision(model, request.rollout.precision)
        self._engine = build_engine(
            request.rollout,
            model=model,
            model_folder=folder,
            eos_token_ids=request.policy.contract.eos_token_ids,
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id,
            why=request.runtime.engine_reason,
        )
        self.rewarder = build_rewarder(
            reward,
            self.tokenizer,
            request.policy.contract,
            store=store,
            outcome=outcome,
            process=None,
            step_separator=step_separator,
            max_tokens=None,
            precision=request.rollout.precision,
            device=model.device,
        )
        self.prompts = [
            PromptRecord(record, encode_prompt(self.tokenizer, record["prompt"]))
            for record in read_records(store.path(request.prompts))
        ]

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_samples: int, seed: int
    ) -> list[Rollout]:
        """Completions of each prompt, those of the first prompt first."""
        return self._engine.generate(prompt_ids, self._sampling, num_samples=num_samples, seed=seed)

    def text(self, rollout: Rollout) -> str:
        """What a rollout says."""
        return completion_text(self.tokenizer, rollout.completion_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.close()
        self.rewarder.close()


def as_completion(record: dict[str, Any], text: str) -> str | list[dict[str, str]]:
    """A completion in the layout of its prompt: plain, or one assistant message."""
    if isinstance(record["prompt"], str):
        return text
    return [{"role": "assistant", "content": text}]

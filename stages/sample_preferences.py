"""Preference pairs drawn from the SFT policy and ranked by a verifier or a reward model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from infra.store import Store
from infra.tracking import Tracker
from schemas.artifacts import DatasetArtifact
from schemas.base import UserError
from schemas.requests import SamplePreferencesRequest
from schemas.rewards import OutcomeRewardConfig, RewardConfig
from schemas.training import SamplePreferencesConfig
from stages.data.records import RECORDS_FILE
from stages.policy_sampling import PolicySampler, as_completion
from stages.provenance import provenance
from stages.rollout.types import Rollout


def run(request: SamplePreferencesRequest, *, run_dir: Path, tracker: Tracker) -> DatasetArtifact:
    """Sample, rank, and keep the pairs whose scores are far enough apart.

    Raises UserError where no prompt gives a pair.
    """
    config = request.config
    store = Store(request.runtime.store)
    reward = (
        RewardConfig(verifier=request.verifier)
        if config.ranker == "verifier"
        else RewardConfig(outcome=OutcomeRewardConfig())
    )
    with PolicySampler(request, store, reward, outcome=request.reward_model) as sampler:
        prompts = sampler.prompts[: config.num_prompts]
        rollouts = sampler.generate(
            [prompt.prompt_ids for prompt in prompts], config.samples_per_prompt, request.seed
        )
        scores = sampler.rewarder(rollouts, [prompt.record for prompt in prompts]).total
        records = [
            {
                "id": f"{prompt.record['id']}-{number}",
                "prompt": prompt.record["prompt"],
                "chosen": as_completion(prompt.record, sampler.text(chosen)),
                "rejected": as_completion(prompt.record, sampler.text(rejected)),
            }
            for index, prompt in enumerate(prompts)
            for number, (chosen, rejected) in enumerate(_pairs(rollouts, scores, index, config))
        ]
    if not records:
        raise UserError(
            f"none of {len(prompts)} prompts gave a pair with scores {config.min_gap} apart: "
            "sample more completions a prompt, take other prompts, or lower "
            "sample_preferences.min_gap"
        )
    num_prompts = len({json.dumps(record["prompt"]) for record in records})
    tracker.log_metrics({"num_pairs": len(records), "prompts_with_pairs": num_prompts}, 0)
    return write_dataset(request, run_dir, "preferences", records, num_prompts)


def write_dataset(
    request: Any, run_dir: Path, split: Any, records: Sequence[dict[str, Any]], num_prompts: int
) -> DatasetArtifact:
    """Write sampled records as a data set."""
    content = run_dir / "content"
    content.mkdir(parents=True, exist_ok=True)
    with (content / RECORDS_FILE).open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n")
    return DatasetArtifact(
        **provenance(request, content),
        split=split,
        layout="preference" if split == "preferences" else "steps",
        num_records=len(records),
        num_prompts=num_prompts,
        metrics={"num_records": len(records)},
    )


def _pairs(
    rollouts: Sequence[Rollout],
    scores: Tensor,
    prompt_index: int,
    config: SamplePreferencesConfig,
) -> Iterator[tuple[Rollout, Rollout]]:
    """Best against worst, second best against second worst, and so on while the gap holds."""
    own = [i for i, rollout in enumerate(rollouts) if rollout.prompt_index == prompt_index]
    ranked = sorted(own, key=lambda i: (-scores[i].item(), i))
    for number in range(min(config.pairs_per_prompt, len(ranked) // 2)):
        best, worst = ranked[number], ranked[-1 - number]
        if scores[best] - scores[worst] < config.min_gap:
            return
        yield rollouts[best], rollouts[worst]

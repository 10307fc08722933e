"""Step labels without labellers: a step is right if answers can be reached from it.

Math-Shepherd (Wang et al. 2024), section 3.3: from the prefix that ends with a step, the policy is
let to finish the solution several times; the share of right answers estimates the step's worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.store import Store
from infra.tracking import Tracker
from schemas.artifacts import DatasetArtifact
from schemas.requests import LabelStepsRequest
from schemas.rewards import RewardConfig
from stages.policy_sampling import PolicySampler
from stages.rollout.types import Rollout
from stages.sample_preferences import write_dataset
from stages.tokenization import StepFinder, completion_text


@dataclass(frozen=True)
class Prefix:
    """A solution cut after one of its steps."""

    solution: int
    input_ids: list[int]
    """Prompt and completion up to and with the step."""
    is_last: bool


def run(request: LabelStepsRequest, *, run_dir: Path, tracker: Tracker) -> DatasetArtifact:
    """Sample solutions, continue each from the end of each step, label the steps."""
    config = request.config
    store = Store(request.runtime.store)
    reward = RewardConfig(verifier=request.verifier)
    with PolicySampler(request, store, reward, step_separator=request.step_separator) as sampler:
        prompts = sampler.prompts[: config.num_prompts]
        solutions = sampler.generate(
            [prompt.prompt_ids for prompt in prompts], config.solutions_per_prompt, request.seed
        )
        find = StepFinder(sampler.tokenizer, request.step_separator)
        ends = [find(solution.completion_ids) for solution in solutions]
        own_scores = sampler.rewarder(solutions, [prompt.record for prompt in prompts]).total
        shares = _continue(sampler, solutions, ends, own_scores.tolist(), request)
        records = []
        for index, solution in enumerate(solutions):
            if not ends[index]:
                continue
            prompt = prompts[solution.prompt_index].record
            records.append(
                {
                    "id": f"{prompt['id']}-{index}",
                    "prompt": prompt["prompt"],
                    "completions": _step_texts(sampler, solution, ends[index], request),
                    "labels": [share > config.threshold for share in shares[index]],
                }
            )
    num_prompts = len({record["id"].split("-")[0] for record in records})
    labels = [label for record in records for label in record["labels"]]
    tracker.log_metrics(
        {"num_steps": len(labels), "right_fraction": sum(labels) / max(len(labels), 1)}, 0
    )
    return write_dataset(request, run_dir, "step_labels", records, num_prompts)


def _continue(
    sampler: PolicySampler,
    solutions: Sequence[Rollout],
    ends: Sequence[Sequence[int]],
    own_scores: Sequence[float],
    request: LabelStepsRequest,
) -> list[list[float]]:
    """Share of right answers from each step of each solution.

    The last step of a finished solution needs no continuation: its own answer is the estimate.
    """
    prefixes = [
        Prefix(
            index,
            [*solution.prompt_ids, *solution.completion_ids[: end + 1]],
            is_last=position == len(ends[index]) - 1 and not solution.truncated,
        )
        for index, solution in enumerate(solutions)
        for position, end in enumerate(ends[index])
    ]
    open_ = [prefix for prefix in prefixes if not prefix.is_last]
    count = request.config.continuations_per_step
    drawn = sampler.generate([p.input_ids for p in open_], count, request.seed + 1) if open_ else []
    joined = [_whole(rollout, open_, solutions) for rollout in drawn]
    records = [sampler.prompts[solutions[prefix.solution].prompt_index].record for prefix in open_]
    scores = sampler.rewarder(joined, records).total.tolist() if joined else []
    shares: list[list[float]] = [[] for _ in solutions]
    position = 0
    for prefix in prefixes:
        if prefix.is_last:
            shares[prefix.solution].append(float(own_scores[prefix.solution] >= 1.0))
            continue
        own = scores[position * count : (position + 1) * count]
        shares[prefix.solution].append(sum(score >= 1.0 for score in own) / count)
        position += 1
    return shares


def _whole(rollout: Rollout, prefixes: Sequence[Prefix], solutions: Sequence[Rollout]) -> Rollout:
    """A continuation joined to its prefix, as a completion of the original prompt."""
    prefix = prefixes[rollout.prompt_index]
    prompt_ids = solutions[prefix.solution].prompt_ids
    completion = [*prefix.input_ids[len(prompt_ids) :], *rollout.completion_ids]
    return Rollout(
        prompt_ids=prompt_ids,
        completion_ids=completion,
        rollout_logprobs=[0.0] * len(completion),
        finish_reason=rollout.finish_reason,
        policy_version=rollout.policy_version,
        prompt_index=rollout.prompt_index,
    )


def _step_texts(
    sampler: PolicySampler, solution: Rollout, ends: Sequence[int], request: LabelStepsRequest
) -> list[str]:
    texts, start = [], 0
    for end in ends:
        text = completion_text(sampler.tokenizer, solution.completion_ids[start : end + 1])
        texts.append(text.removesuffix(request.step_separator))
        start = end + 1
    return texts

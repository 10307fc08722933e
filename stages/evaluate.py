"""Candidate, SFT baseline and incumbent on the same held-out records."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infra.devices import resolve_device
from infra.store import Store
from infra.tracking import Tracker
from schemas.artifacts import (
    EVALUATION_RECORDS_FILE,
    EvaluationReport,
    ModelScores,
    PolicyCheckpoint,
)
from schemas.requests import EvaluateRequest
from schemas.rewards import RewardConfig
from stages.core.kl import kl_k1
from stages.core.metrics import pass_at_k
from stages.data.records import read_records
from stages.forward import Sequences, all_completion_logprobs
from stages.models import check_contract, load_policy, load_tokenizer
from stages.precision import use_precision
from stages.provenance import provenance
from stages.rewards.composition import RewardBreakdown, Rewarder, build_rewarder
from stages.rl.rollouts import PromptRecord
from stages.rollout.engine import build_engine
from stages.rollout.types import Rollout
from stages.tokenization import completion_text, encode_prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampled:
    """What one model answered to the records, _N = records times samples."""

    rollouts: list[Rollout]
    rewards: RewardBreakdown
    kl: Tensor
    """[_N], sequence KL to the SFT policy in nats."""
    proxy: Tensor | None
    """[_N], what the trained reward models gave; None where there is none."""

    def components(self) -> dict[str, Tensor]:
        """Unweighted components of the reward by name, and `proxy` where there is one, [_N]."""
        proxy = {} if self.proxy is None else {"proxy": self.proxy}
        return self.rewards.components | proxy


def run(request: EvaluateRequest, *, run_dir: Path, tracker: Tracker) -> EvaluationReport:
    """Sample every model on every record with the same seeds, and keep every record's result."""
    store = Store(request.runtime.store)
    incumbent = request.incumbent or request.baseline
    named = {
        "candidate": request.candidate,
        "baseline": request.baseline,
        "incumbent": incumbent,
    }
    tokenizer = load_tokenizer(store.path(request.candidate))
    contract = request.candidate.contract
    for name in ("baseline", "incumbent"):
        check_contract("the candidate", contract, f"the {name}", named[name].contract)
    prompts = [
        PromptRecord(record, encode_prompt(tokenizer, record["prompt"]))
        for record in read_records(store.path(request.records))
    ]
    device = resolve_device(request.runtime.device)
    rewarder = build_rewarder(
        request.reward,
        tokenizer,
        contract,
        store=store,
        outcome=request.reward_model,
        process=request.process_reward_model,
        step_separator=request.step_separator,
        max_tokens=None,
        precision=request.rollout.precision,
        device=device,
    )
    sampled: dict[str, Sampled] = {}
    try:
        # The same weights are sampled once, under however many names they stand.
        by_digest: dict[str, Sampled] = {}
        for name, policy in named.items():
            if policy.sha256 not in by_digest:
                logger.info("sampling the %s", name)
                by_digest[policy.sha256] = _sample(
                    policy, request, store, tokenizer, prompts, rewarder, device
                )
            sampled[name] = by_digest[policy.sha256]
    finally:
        rewarder.close()
    scores = {name: _scores(named[name], sampled[name], request) for name in named}
    content = run_dir / "content"
    content.mkdir(parents=True, exist_ok=True)
    _write_records(content / EVALUATION_RECORDS_FILE, sampled, prompts, tokenizer)
    metrics = {
        f"{name}/{key}": value
        for name, own in scores.items()
        for key, value in own.metrics().items()
    }
    tracker.log_metrics(metrics, 0)
    return EvaluationReport(
        **provenance(request, content),
        candidate=scores["candidate"],
        baseline=scores["baseline"],
        incumbent=scores["incumbent"],
        incumbent_is_baseline=request.incumbent is None,
        metrics=metrics,
    )


def _sample(
    policy: PolicyCheckpoint,
    request: EvaluateRequest,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptRecord],
    rewarder: Rewarder,
    device: torch.device,
) -> Sampled:
    sampling = request.config.sampling
    model = load_policy(store.path(policy), device).eval()
    use_precision(model, request.rollout.precision)
    engine = build_engine(
        request.rollout,
        model=model,
        model_folder=store.path(policy),
        eos_token_ids=policy.contract.eos_token_ids,
        tokenizer=tokenizer,
        pad_token_id=tokenizer.pad_token_id,
        why=request.runtime.engine_reason,
    )
    try:
        rollouts = engine.generate(
            [prompt.prompt_ids for prompt in prompts],
            sampling,
            num_samples=request.config.num_samples,
            seed=request.seed,
        )
    finally:
        engine.close()
    rewards = rewarder(rollouts, [prompt.record for prompt in prompts])
    proxy = _proxy(rewards, request.reward)
    sequences = Sequences(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.completion_ids for rollout in rollouts],
    )
    width = max(len(rollout.completion_ids) for rollout in rollouts)
    # Greedy samples come from the distribution at temperature 1.
    temperature = sampling.temperature or 1.0
    logprobs = all_completion_logprobs(model, sequences, width, None, temperature)
    if policy.sha256 == request.baseline.sha256:
        return Sampled(rollouts, rewards, torch.zeros(len(rollouts)), proxy)
    reference = load_policy(store.path(request.baseline), device).eval()
    use_precision(reference, request.rollout.precision)
    ref_logprobs = all_completion_logprobs(reference, sequences, width, None, temperature)
    kl = kl_k1(logprobs, ref_logprobs).sum(1).cpu()
    return Sampled(rollouts, rewards, kl, proxy)


def _scores(policy: PolicyCheckpoint, sampled: Sampled, request: EvaluateRequest) -> ModelScores:
    right = sampled.rewards.components["verifier"] == 1.0
    num_samples = request.config.num_samples
    per_record = right.view(-1, num_samples).sum(1).tolist()
    lengths = [len(rollout.completion_ids) for rollout in sampled.rollouts]
    truncated = [rollout.truncated for rollout in sampled.rollouts]
    return ModelScores(
        sha256=policy.sha256,
        num_records=len(per_record),
        num_samples=num_samples,
        pass_at={
            f"pass@{k}": sum(pass_at_k(num_samples, int(c), k) for c in per_record)
            / len(per_record)
            for k in request.config.pass_at
        },
        reward=sampled.rewards.total.mean().item(),
        kl=sampled.kl.mean().item(),
        length=sum(lengths) / len(lengths),
        truncated_fraction=sum(truncated) / len(truncated),
        components={name: own.mean().item() for name, own in sampled.components().items()},
    )


def _proxy(rewards: RewardBreakdown, reward: RewardConfig) -> Tensor | None:
    """What the trained reward models gave, weighted as in training, [_N]; None without any.

    The composed reward would not do: it holds the verifier, which is the gold standard.
    """
    parts = [
        section.weight * rewards.components[name]
        for name, section in (("outcome", reward.outcome), ("process", reward.process))
        if section is not None
    ]
    return torch.stack(parts).sum(0) if parts else None


def _write_records(
    path: Path,
    sampled: dict[str, Sampled],
    prompts: Sequence[PromptRecord],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """One row for each model, record and sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, object]] = []
    for name, own in sampled.items():
        components = own.components()
        for index, rollout in enumerate(own.rollouts):
            rows.append(
                {
                    "model": name,
                    "record": prompts[rollout.prompt_index].record["id"],
                    "completion": completion_text(tokenizer, rollout.completion_ids),
                    "correct": bool(own.rewards.components["verifier"][index] == 1.0),
                    "reward": own.rewards.total[index].item(),
                    **{key: value[index].item() for key, value in components.items()},
                    "kl": own.kl[index].item(),
                    "length": len(rollout.completion_ids),
                    "truncated": rollout.truncated,
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), path)

"""The reinforcement-learning stage: PPO, GRPO, RLOO or DPO by one word of configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infra.devices import resolve_device
from infra.store import Store
from infra.tracking import Tracker
from schemas.artifacts import TRACES_FILE, PolicyCheckpoint
from schemas.base import UserError
from schemas.requests import TrainRLRequest
from schemas.rl import OnlineConfig
from stages import supervised
from stages.adapters import add_adapters, merge
from stages.data.records import read_datasets, read_records
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.models import (
    load_policy,
    load_tokenizer,
    load_with_head,
    num_parameters,
    save_model,
    to_device,
)
from stages.precision import freeze, use_precision
from stages.provenance import provenance
from stages.rewards.composition import build_rewarder
from stages.rl import dpo, online
from stages.rl.algorithms import online_algorithm
from stages.rl.held_out import split_held_out
from stages.rl.rollouts import PromptRecord
from stages.rl.traces import join_traces
from stages.rollout.engine import build_engine
from stages.shared_critic import Critic, SharedCritic
from stages.stability import write_audit
from stages.tokenization import decode, encode_prompt
from stages.train_reward_model import encode_pairs


def run(request: TrainRLRequest, *, run_dir: Path, tracker: Tracker) -> PolicyCheckpoint:
    """Train the SFT policy by the chosen algorithm; the SFT policy stays the reference."""
    store = Store(request.runtime.store)
    folder = store.path(request.policy)
    device = resolve_device(request.runtime.device)
    tokenizer = load_tokenizer(folder)
    settings = request.config.dpo if request.config.algorithm == "dpo" else request.config.online
    assert settings is not None
    section = "rl.dpo" if request.config.algorithm == "dpo" else "rl.online"
    policy = use_precision(load_policy(folder, device), settings.precision)
    use_gradient_checkpointing(policy, settings.gradient_checkpointing, section)
    if settings.lora is not None:
        add_adapters(policy, settings.lora, section=f"{section}.lora", seed=request.seed)
    if request.config.algorithm == "dpo":
        num_steps, metrics, audit = _offline(request, policy, tokenizer, run_dir, tracker)
    else:
        num_steps, metrics, audit = _online(request, policy, tokenizer, run_dir, tracker)
    content = run_dir / "content"
    contract = save_model(merge(policy), tokenizer, content)
    join_traces(run_dir / "traces", content / TRACES_FILE)
    write_audit(content, audit)
    return PolicyCheckpoint(
        **provenance(request, content),
        algorithm=request.config.algorithm,
        contract=contract,
        num_parameters=num_parameters(policy),
        num_steps=num_steps,
        metrics=metrics,
    )


def _online(
    request: TrainRLRequest,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
    tracker: Tracker,
) -> tuple[int, dict[str, float], dict[str, Any]]:
    config = request.config.online
    assert config is not None and request.reward is not None
    assert request.prompts is not None and request.rollout is not None
    store = Store(request.runtime.store)
    folder = store.path(request.policy)
    algorithm = online_algorithm(request.config)
    reference = policy
    if config.lora is None:
        reference = freeze(use_precision(load_policy(folder, policy.device), config.precision))
    critic: Critic | None = None
    if algorithm.critic is not None and algorithm.critic.shared_weight is not None:
        critic = SharedCritic(policy)
    elif algorithm.critic is not None:
        critic = to_device(load_with_head(folder, "value", request.seed), policy.device)
        use_precision(critic, config.precision)
        use_gradient_checkpointing(critic, config.gradient_checkpointing, "rl.online")
    engine = build_engine(
        request.rollout,
        model=policy,
        model_folder=folder,
        eos_token_ids=request.policy.contract.eos_token_ids,
        tokenizer=tokenizer,
        pad_token_id=tokenizer.pad_token_id,
        while_training=config.max_policy_lag > 0,
        why=request.runtime.engine_reason,
    )
    rewarder = build_rewarder(
        request.reward,
        tokenizer,
        request.policy.contract,
        store=store,
        outcome=request.reward_model,
        process=request.process_reward_model,
        step_separator=request.step_separator,
        max_tokens=config.micro_batch_tokens,
        precision=config.precision,
        device=policy.device,
    )
    prompts = encode_prompts(read_records(store.path(request.prompts)), tokenizer)
    _check_context(prompts, config, request.policy.contract.max_positions)
    prompts, held_out = split_held_out(prompts, config.stability.held_out)
    try:
        result = online.train(
            online.Models(policy, reference, critic),
            algorithm,
            engine,
            rewarder,
            prompts,
            held_out,
            config,
            decode=partial(decode, tokenizer),
            engine_is_exact=(
                request.rollout.engine == "native"
                and config.precision == "float32"
                and config.max_policy_lag == 0
            ),
            seed=request.seed,
            run_dir=run_dir,
            tracker=tracker,
        )
        audit = {
            "credit": algorithm.state_dict(),
            "stability": result.interventions,
            "held_out": result.checks,
            "rollout": {
                "engine": request.rollout.engine,
                "reason": request.runtime.engine_reason,
                **engine.report(),
            },
        }
    finally:
        engine.close()
        rewarder.close()
    return result.num_steps, result.metrics, audit


def _offline(
    request: TrainRLRequest,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
    tracker: Tracker,
) -> tuple[int, dict[str, float], dict[str, Any]]:
    config = request.config.dpo
    assert config is not None and request.preferences is not None
    store = Store(request.runtime.store)
    records = read_datasets(store, [request.preferences])
    pairs, num_truncated = encode_pairs(records, tokenizer, config.max_length)
    supervised.refuse_truncation(
        "pairs", num_truncated, len(pairs), config.max_truncated_fraction, config.max_length
    )
    # Until it is trained, or takes the weights of a checkpoint, the policy is the reference.
    reference = dpo.reference_logprobs(policy, pairs, config)
    result = supervised.train(
        policy,
        section="rl.dpo",
        record_ids=[str(record["id"]) for record in records],
        micro_losses=lambda rows, max_tokens: dpo.micro_losses(
            policy, [pairs[row] for row in rows], reference.select(rows), config, max_tokens
        ),
        settings=config,
        seed=request.seed,
        run_dir=run_dir,
        tracker=tracker,
    )
    metrics = result.metrics | {"num_truncated": num_truncated}
    return result.num_steps, metrics, {"stability": result.interventions}


def encode_prompts(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[PromptRecord]:
    """Verifiable records with their prompts as token ids."""
    return [PromptRecord(r, encode_prompt(tokenizer, r["prompt"])) for r in records]


def _check_context(prompts: list[PromptRecord], config: OnlineConfig, max_positions: int) -> None:
    longest = max(prompts, key=lambda prompt: len(prompt.prompt_ids))
    needed = len(longest.prompt_ids) + config.sampling.max_completion_tokens
    if needed > max_positions:
        raise UserError(
            f"prompt {longest.record['id']} has {len(longest.prompt_ids)} tokens; with "
            f"rl.online.sampling.max_completion_tokens {config.sampling.max_completion_tokens} "
            f"that is {needed}, beyond the model's context of {max_positions}: lower the limit, "
            "or drop long prompts"
        )

"""What one optimizer step costs: time by part, tokens a second, memory, share of the peak.

    python -m tests.benchmarks.step --algorithm grpo --model FOLDER --prompts 8 --group-size 8 \
        --prompt-tokens 64 --completion-tokens 64 --precision bfloat16

Runs the project's own functions on random token ids, of fixed lengths or of lengths drawn between
two, and prints one JSON object. The model is any Hugging Face folder; reward models and critics get
a fresh head on it. The reward of a rollout is a number drawn from its tokens, so that no verifier
is timed; with --reward-model, PPO's is that of a model of the policy's size.

Counts of tokens: `generation` counts completions; `training` counts prompt and completion of
every sequence, a shared prompt once for each of its completions, as a trainer that does not share
them would have to process. A rollout batch counts once, however many passes --num-epochs makes.

Every step works on the same records. The reference's log-probabilities for DPO are computed in each
step, as the stage does once for each record, before its first update; --reference cached leaves
them out, and what is measured is a step of any later epoch.
"""

# ruff: noqa: E402
from __future__ import annotations

from stages.imports import hide_unused_packages

# As in a stage's process, whose memory is measured here.
hide_unused_packages()

import argparse
import gc
import json
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from infra.devices import resolve_device
from schemas.rl import DPOConfig, RLConfig, RolloutConfig
from schemas.training import (
    OptimizerConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SFTConfig,
    StabilityConfig,
)
from stages import train_process_reward_model, train_reward_model, train_sft
from stages.core.products import linear
from stages.forward import Sequences
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.memory import TokenBudget, tokens_at_once
from stages.models import load_policy, load_with_head, num_parameters, to_device
from stages.precision import freeze, use_precision, weights_held
from stages.rewards.composition import RewardBreakdown
from stages.rewards.models import outcome_scores
from stages.rl import dpo
from stages.rl.algorithms import online_algorithm
from stages.rl.rollouts import (
    PromptRecord,
    ScoredRollouts,
    first_pass_on_policy,
    make_experience,
    shared_prompt,
)
from stages.rl.update import Learner, update
from stages.rollout.engine import build_engine
from stages.rollout.types import Rollout
from stages.stability import Stability
from stages.supervised import MicroLoss
from stages.train_process_reward_model import Labelled
from stages.train_reward_model import Pair
from stages.train_sft import Example
from tests.benchmarks import workload
from tests.benchmarks.clock import Clock, TimedOptimizer
from tests.benchmarks.workload import ALGORITHMS, ONLINE, Lengths, Shape, step_lengths

_PEAK_SECONDS = 4.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, or what is given in its place."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        shape = Shape.of(args)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    clock = Clock()
    make = _online if args.algorithm in ONLINE else _offline
    work = make(args, shape.lengths(args.algorithm), device, clock)
    for _ in range(args.warmup):
        work.step()
    clock.reset()
    for _ in range(args.steps):
        work.step()
    print(json.dumps(report(args, device, work, clock)))


@dataclass(frozen=True)
class Work:
    """A step, and what it processes."""

    step: Callable[[], None]
    num_parameters: int
    num_trained_parameters: int
    """Of every model that an optimizer moves."""
    training_tokens: int
    generated_tokens: int
    model_flops: float
    """Matrix products of one step as the published count has it: 6 (training) or 2 (inference)
    times the parameters a token goes through; attention and recomputation are left out."""
    attention_flops: float
    """Products of queries, keys and values, those that the causal mask removes not counted."""
    micro_batch_tokens: int


def _offline(
    args: argparse.Namespace, lengths: Sequence[Lengths], device: torch.device, clock: Clock
) -> Work:
    folder = Path(args.model)
    settings: dict[str, Any] = {
        "optimizer": OptimizerConfig(learning_rate=1e-6),
        "max_length": args.prompt_tokens + args.completion_tokens,
        "micro_batch_tokens": args.micro_batch_tokens or None,
        "precision": args.precision,
    }
    kind = {"rm": "outcome", "prm": "process"}.get(args.algorithm)
    model = load_with_head(folder, kind, 0) if kind else load_policy(folder, device)
    use_precision(to_device(model, device), args.precision)
    use_gradient_checkpointing(model, args.gradient_checkpointing, args.algorithm)
    budget = tokens_at_once(settings["micro_batch_tokens"], model)
    optimizer = _optimizer(model, settings["optimizer"], clock)
    draw = _Drawn(model.config.get_text_config().vocab_size, args.seed)
    passes = 6
    losses: Callable[[], Iterator[MicroLoss]]
    match args.algorithm:
        case "sft":
            sft = SFTConfig.model_validate(settings)
            examples = [Example(draw.ids(n), [True] * n) for n in workload.sequences(lengths)]
            losses = partial(train_sft.micro_losses, model, examples, sft, budget)
        case "prm":
            prm = ProcessRewardModelConfig.model_validate(settings)
            labelled = [draw.labelled(one) for one in lengths]
            losses = partial(train_process_reward_model.micro_losses, model, labelled, prm, budget)
        case "rm":
            rm = RewardModelConfig.model_validate(settings)
            pairs = [draw.pair(one) for one in lengths]
            losses = partial(train_reward_model.micro_losses, model, pairs, rm, budget)
        case _:
            config = DPOConfig.model_validate(settings)
            pairs = [draw.pair(one) for one in lengths]
            # As in the stage: before its first update, the policy is the reference.
            reference = partial(dpo.reference_logprobs, model, pairs, config)
            cached = reference()
            if args.reference == "pass":
                passes += 2

            def losses() -> Iterator[MicroLoss]:
                scores = cached
                if args.reference == "pass":
                    with clock.part("log-probabilities"):
                        scores = reference()
                yield from dpo.micro_losses(model, pairs, scores, config, budget)

    def step() -> None:
        model.train()
        with clock.part("loss and backward"), weights_held(model):
            for micro in losses():
                micro.loss.backward()
        optimizer.clip()
        optimizer.step()

    size = num_parameters(model)
    tokens = workload.sequences(lengths)
    return Work(
        step,
        size,
        size,
        sum(tokens),
        0,
        float(passes * size * sum(tokens)),
        passes * _attention(model, tokens),
        budget,
    )


def _online(
    args: argparse.Namespace, lengths: Sequence[Lengths], device: torch.device, clock: Clock
) -> Work:
    folder = Path(args.model)
    config = RLConfig.model_validate(
        {
            "algorithm": args.algorithm,
            "online": {
                "prompts_per_step": args.prompts,
                "group_size": args.group_size,
                "num_epochs": args.num_epochs,
                "micro_batch_tokens": args.micro_batch_tokens or None,
                "precision": args.precision,
                "sampling": {"max_completion_tokens": args.completion_tokens},
            },
            args.algorithm: {"optimizer": {"learning_rate": 1e-6}} | _ALGORITHM[args.algorithm],
        }
    )
    online = config.online
    assert online is not None
    algorithm = online_algorithm(config)
    policy = use_precision(load_policy(folder, device), args.precision)
    use_gradient_checkpointing(policy, args.gradient_checkpointing, "rl.online")
    reference = None
    if algorithm.needs_reference:
        reference = freeze(use_precision(load_policy(folder, device), args.precision))
    critic = critic_optimizer = None
    if algorithm.critic is not None:
        critic = _with_head(folder, "value", device, args)
        use_gradient_checkpointing(critic, args.gradient_checkpointing, "rl.online")
        critic_optimizer = _optimizer(critic, algorithm.critic.optimizer, clock)
    reward_model = None
    if args.reward_model and args.algorithm == "ppo":
        reward_model = freeze(_with_head(folder, "outcome", device, args))
    optimizer = _optimizer(policy, algorithm.optimizer, clock)
    engine = build_engine(
        RolloutConfig(engine=args.engine),
        model=policy,
        model_folder=folder,
        eos_token_ids=[],  # every completion has its full length
        pad_token_id=0,
    )
    draw = _Drawn(policy.config.get_text_config().vocab_size, args.seed)
    records = [PromptRecord({"id": str(i)}, draw.ids(one.prompt)) for i, one in enumerate(lengths)]
    learner = Learner(policy, optimizer, critic, critic_optimizer)
    max_tokens = tokens_at_once(online.micro_batch_tokens, policy, shared_prompt(records, online))
    budget = TokenBudget(max_tokens, "rl.online")
    stability = Stability(StabilityConfig(), "rl.online.stability")
    exact = args.engine == "native" and args.precision == "float32"

    def step() -> None:
        number = optimizer.step_count
        with clock.part("weight sync"):
            engine.update_weights(policy, number)
        with clock.part("generate"):
            rollouts = engine.generate(
                [record.prompt_ids for record in records],
                online.sampling,
                num_samples=args.group_size,
                seed=number,
            )
        with clock.part("score"):
            found = ScoredRollouts(rollouts, _rewards(rollouts, reward_model, budget.tokens))
        with clock.part("log-probabilities"):
            experience = make_experience(
                found,
                policy,
                reference,
                critic,
                config=online,
                budget=budget,
                engine_is_exact=exact,
            )
            credit = algorithm.credit(experience, number)
        with clock.part("loss and backward"):
            update(
                learner,
                experience,
                credit,
                algorithm,
                online,
                seed=number,
                train_policy=True,
                engine_is_exact=exact,
                stability=stability,
                budget=budget,
                step=1,
                record_ids=lambda rollouts: [],
            )

    training = 6 * args.num_epochs
    of_policy = training + 2 * (not (exact or first_pass_on_policy(online)))
    passes = [(policy, of_policy)]
    passes += [(model, 2) for model in (reference, reward_model) if model is not None]
    if critic is not None:
        passes.append((critic, training + 2))
    tokens = workload.sequences(lengths)
    generated = workload.completion_tokens(lengths)
    size = num_parameters(policy)
    flops = 2.0 * size * generated
    flops += sum(count * num_parameters(model) * sum(tokens) for model, count in passes)
    attention = sum(count * _attention(model, tokens) for model, count in passes)
    # A token that is sampled looks at all before it; nobody has to look at prompts twice.
    prompts = [one.prompt for one in lengths for _ in one.completions]
    attention += 2 * (_attention(policy, tokens) - _attention(policy, prompts))
    trained = size + (num_parameters(critic) if critic is not None else 0)
    return Work(step, size, trained, sum(tokens), generated, flops, attention, budget.tokens)


_ALGORITHM: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.0},
    "rloo": {"kl_coef": 0.05},
    "ppo": {"kl_coef": 0.05, "critic_optimizer": {"learning_rate": 1e-6}},
}


def _optimizer(model: PreTrainedModel, config: OptimizerConfig, clock: Clock) -> TimedOptimizer:
    optimizer = TimedOptimizer.create(model, config, 1000)
    assert isinstance(optimizer, TimedOptimizer)
    optimizer.clock = clock
    return optimizer


def _with_head(
    folder: Path, kind: str, device: torch.device, args: argparse.Namespace
) -> PreTrainedModel:
    return use_precision(to_device(load_with_head(folder, kind, 0), device), args.precision)


def _attention(model: PreTrainedModel, tokens: Sequence[int]) -> float:
    """Half of one forward pass's products in attention over sequences of these lengths.

    Causal: token t looks at t others, at a cost of 4 t times the width of all heads; a pass of
    training counts 6 times this, one of inference 2, as parameters do.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return float(config.num_hidden_layers * width * sum(length**2 for length in tokens))


class _Drawn:
    """Random token ids from one seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._vocab_size = vocab_size

    def ids(self, length: int) -> list[int]:
        ids: list[int] = torch.randint(
            self._vocab_size, (length,), generator=self._generator
        ).tolist()
        return ids

    def pair(self, lengths: Lengths) -> Pair:
        chosen, rejected = lengths.completions
        return Pair(self.ids(lengths.prompt), self.ids(chosen), self.ids(rejected))

    def labelled(self, lengths: Lengths) -> Labelled:
        sizes = step_lengths(lengths.completions[0])
        ends = [sum(sizes[: i + 1]) - 1 for i in range(len(sizes))]
        labels = [i % 2 for i in range(len(ends))]
        return Labelled(self.ids(lengths.prompt), self.ids(sum(sizes)), ends, labels)


def _rewards(
    rollouts: Sequence[Rollout], model: PreTrainedModel | None, max_tokens: int
) -> RewardBreakdown:
    if model is None:
        scores = torch.tensor([float(sum(r.completion_ids) % 7) for r in rollouts])
    else:
        sequences = Sequences(
            [r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts]
        )
        scores = outcome_scores(model, sequences, max_tokens).cpu()
    return RewardBreakdown(scores=scores, total=scores, components={"drawn": scores})


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP a second (of a processor's time on the CPU) of a matrix product of 2,048 squared."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left = torch.randn(2048, 2048, device=device).to(dtype)
    right = torch.randn(2048, 2048, device=device).to(dtype)
    clock = Clock()
    seconds: list[float] = []
    # Eight products, but no more of them once they have taken so long: a processor without bfloat16
    # needs two seconds for one.
    while len(seconds) < 8 and sum(seconds) <= _PEAK_SECONDS:
        clock.reset()
        with clock.part("product"):
            linear(left, right)
        seconds.append(_seconds(clock, device)["product"])
    return 2 * 2048**3 / min(seconds)


def _seconds(clock: Clock, device: torch.device) -> dict[str, float]:
    """By part: of a processor's time on the CPU, on the wall where a device computes."""
    return clock.wall if device.type == "cuda" else clock.cpu


def report(
    args: argparse.Namespace, device: torch.device, work: Work, clock: Clock
) -> dict[str, Any]:
    """The JSON object."""
    seconds = _seconds(clock, device)
    total = sum(seconds.values())
    wall = sum(clock.wall.values())
    training = total - seconds.get("generate", 0.0) - seconds.get("weight sync", 0.0)
    peak = measured_peak(device, args.precision)
    found: dict[str, Any] = {
        "algorithm": args.algorithm,
        "model": args.model,
        "num_parameters": work.num_parameters,
        "num_trained_parameters": work.num_trained_parameters,
        "precision": args.precision,
        "engine": args.engine if work.generated_tokens else None,
        "shape": {
            "prompts": args.prompts,
            "group_size": args.group_size if work.generated_tokens else None,
            "prompt_tokens": args.prompt_tokens,
            "completion_tokens": args.completion_tokens,
            "min_prompt_tokens": args.min_prompt_tokens or args.prompt_tokens,
            "min_completion_tokens": args.min_completion_tokens or args.completion_tokens,
            "num_epochs": args.num_epochs if work.generated_tokens else None,
            "reward_model": args.reward_model and args.algorithm == "ppo",
            "reference": args.reference if args.algorithm == "dpo" else None,
            "micro_batch_tokens": work.micro_batch_tokens,
            "gradient_checkpointing": args.gradient_checkpointing,
            "seed": args.seed,
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": args.steps,
        "seconds_a_step": wall / args.steps,
        "cpu_seconds_a_step": sum(clock.cpu.values()) / args.steps,
        "cpu_seconds_by_part": {k: round(v / args.steps, 4) for k, v in clock.cpu.items()},
        "seconds_by_part": {k: round(v / args.steps, 4) for k, v in clock.wall.items()},
        "training_tokens": work.training_tokens,
        "training_tokens_a_cpu_second": work.training_tokens * args.steps / training,
        "tokens_a_cpu_second": work.training_tokens * args.steps / total,
        "tokens_a_second": work.training_tokens * args.steps / wall,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "model_flops_a_step": work.model_flops,
        "attention_flops_a_step": work.attention_flops,
        "measured_peak_flops": peak,
        "fraction_of_peak": work.model_flops * args.steps / total / peak,
    }
    if work.generated_tokens:
        generate = seconds["generate"]
        found["generated_tokens"] = work.generated_tokens
        found["generated_tokens_a_cpu_second"] = work.generated_tokens * args.steps / generate
    if device.type == "cuda":
        found["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--algorithm", choices=ALGORITHMS, required=True)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    workload.add_options(parser)
    parser.add_argument("--engine", choices=("native", "vllm"), default="native")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="keep the input of each layer alone, and compute the layer again",
    )
    return parser


if __name__ == "__main__":
    gc.freeze()  # as in a stage's process: see `stages.imports.import_stage`
    main()

"""What one optimizer step costs: time by part, tokens a second, memory, share of the peak.

    python -m tests.benchmarks.step --algorithm grpo --model FOLDER --prompts 8 --group-size 8 \
        --prompt-tokens 64 --completion-tokens 64 --precision bfloat16

Runs the project's own functions on random token ids of fixed lengths and prints one JSON object.
The model is any Hugging Face folder; reward models and critics get a fresh head on it, and the
reward of a rollout is a number drawn from its seed, so that no verifier is timed.

Counts of tokens: `generation` counts completions; `training` counts prompt and completion of
every sequence, a shared prompt once for each of its completions, as a trainer that does not share
them would have to process.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

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
from stages.memory import TokenBudget
from stages.models import load_policy, load_with_head, num_parameters, to_device
from stages.optimization import Optimizer
from stages.precision import use_precision
from stages.rewards.composition import RewardBreakdown
from stages.rl import dpo
from stages.rl.algorithms import online_algorithm
from stages.rl.rollouts import PromptRecord, ScoredRollouts, make_experience
from stages.rl.update import Learner, update
from stages.rollout.engine import build_engine
from stages.rollout.types import Rollout
from stages.stability import Stability
from stages.supervised import MicroLoss
from stages.train_process_reward_model import Labelled
from stages.train_reward_model import Pair
from stages.train_sft import Example

ALGORITHMS = ("sft", "rm", "prm", "dpo", "grpo", "rloo", "ppo")
_STEP_TOKENS = 16
"""Tokens of a step of a solution, for the process reward model."""


@dataclass
class Clock:
    """Seconds by part, on the wall and of this process's processors."""

    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - cpu


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    work = _online(args, device) if args.algorithm in ("grpo", "rloo", "ppo") else None
    work = work or _offline(args, device)
    for _ in range(args.warmup):
        work.step(Clock())
    clock = Clock()
    for _ in range(args.steps):
        work.step(clock)
    print(json.dumps(report(args, device, work, clock)))


@dataclass(frozen=True)
class Work:
    """A step, and what it processes."""

    step: Callable[[Clock], None]
    num_parameters: int
    training_tokens: int
    generated_tokens: int
    model_flops: float
    """Matrix products of one step as the published count has it: 6 (training) or 2 (inference)
    times the parameters a token goes through; attention and recomputation are left out."""


def _offline(args: argparse.Namespace, device: torch.device) -> Work:
    folder = Path(args.model)
    optimizer_config = OptimizerConfig(learning_rate=1e-6)
    budget = args.micro_batch_tokens
    settings: dict[str, Any] = {
        "optimizer": optimizer_config,
        "max_length": args.prompt_tokens + args.completion_tokens,
        "micro_batch_tokens": args.micro_batch_tokens,
        "precision": args.precision,
    }
    kind = {"rm": "outcome", "prm": "process"}.get(args.algorithm)
    model = load_with_head(folder, kind, 0) if kind else load_policy(folder, device)
    use_precision(to_device(model, device), args.precision)
    optimizer = Optimizer.create(model, optimizer_config, 1000)
    draw = _Drawn(model.config.get_text_config().vocab_size, args)
    tokens = args.prompt_tokens + args.completion_tokens
    extra = 0.0
    losses: Callable[[], Iterator[MicroLoss]]
    match args.algorithm:
        case "sft":
            sft = SFTConfig.model_validate(settings)
            examples = [Example(draw.ids(tokens), [True] * tokens) for _ in range(args.prompts)]
            losses = partial(train_sft.micro_losses, model, examples, sft, budget)
            num_tokens = args.prompts * tokens
        case "prm":
            prm = ProcessRewardModelConfig.model_validate(settings)
            ends = list(range(_STEP_TOKENS - 1, args.completion_tokens, _STEP_TOKENS))
            labelled = [
                Labelled(draw.prompt(), draw.completion(), ends, [i % 2 for i in range(len(ends))])
                for _ in range(args.prompts)
            ]
            losses = partial(train_process_reward_model.micro_losses, model, labelled, prm, budget)
            num_tokens = args.prompts * tokens
        case "rm":
            rm = RewardModelConfig.model_validate(settings)
            pairs = draw.pairs()
            losses = partial(train_reward_model.micro_losses, model, pairs, rm, budget)
            num_tokens = 2 * args.prompts * tokens
        case _:
            config = DPOConfig.model_validate(settings)
            pairs = draw.pairs()
            num_tokens = 2 * args.prompts * tokens
            extra = 2.0 * num_parameters(model) * num_tokens
            reference = use_precision(load_policy(folder, device), args.precision).eval()

            def losses() -> Iterator[MicroLoss]:
                scores = dpo.reference_logprobs(reference, pairs, config)
                yield from dpo.micro_losses(model, pairs, scores, config, budget)

    def step(clock: Clock) -> None:
        model.train()
        micro = losses()
        while True:
            with clock.part("loss and backward"):
                one = next(micro, None)
                if one is None:
                    break
                one.loss.backward()
        with clock.part("optimizer"):
            optimizer.clip()
            optimizer.step()

    size = num_parameters(model)
    return Work(step, size, num_tokens, 0, 6.0 * size * num_tokens + extra)


def _online(args: argparse.Namespace, device: torch.device) -> Work:
    folder = Path(args.model)
    config = RLConfig.model_validate(
        {
            "algorithm": args.algorithm,
            "online": {
                "prompts_per_step": args.prompts,
                "group_size": args.group_size,
                "micro_batch_tokens": args.micro_batch_tokens,
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
    reference = None
    if algorithm.needs_reference:
        reference = use_precision(load_policy(folder, device), args.precision).eval()
    critic = critic_optimizer = None
    if algorithm.critic is not None:
        critic = use_precision(
            to_device(load_with_head(folder, "value", 0), device), args.precision
        )
        critic_optimizer = Optimizer.create(critic, algorithm.critic.optimizer, 1000)
    optimizer = Optimizer.create(policy, algorithm.optimizer, 1000)
    engine = build_engine(
        RolloutConfig(engine=args.engine),
        model=policy,
        model_folder=folder,
        eos_token_ids=[],  # every completion has its full length
        pad_token_id=0,
    )
    draw = _Drawn(policy.config.get_text_config().vocab_size, args)
    records = [PromptRecord({"id": str(i)}, draw.prompt()) for i in range(args.prompts)]
    learner = Learner(policy, optimizer, critic, critic_optimizer)
    budget = TokenBudget(args.micro_batch_tokens, "rl.online")
    stability = Stability(StabilityConfig(), "rl.online.stability")
    exact = args.engine == "native" and args.precision == "float32"

    def step(clock: Clock) -> None:
        with clock.part("weight sync"):
            engine.update_weights(policy, optimizer.step_count)
        with clock.part("generate"):
            rollouts = engine.generate(
                [record.prompt_ids for record in records],
                online.sampling,
                num_samples=args.group_size,
                seed=optimizer.step_count,
            )
        with clock.part("score"):
            found = ScoredRollouts(rollouts, _rewards(rollouts))
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
            credit = algorithm.credit(experience, optimizer.step_count)
        with clock.part("loss, backward and optimizer"):
            update(
                learner,
                experience,
                credit,
                algorithm,
                online,
                seed=optimizer.step_count,
                train_policy=True,
                engine_is_exact=exact,
                stability=stability,
                budget=budget,
                step=1,
                record_ids=lambda rollouts: [],
            )

    rows = args.prompts * args.group_size
    tokens = rows * (args.prompt_tokens + args.completion_tokens)
    passes = 6.0 + 2.0 * (reference is not None)
    flops = passes * num_parameters(policy) * tokens
    flops += 2.0 * num_parameters(policy) * rows * args.completion_tokens
    if critic is not None:
        flops += 8.0 * num_parameters(critic) * tokens
    return Work(step, num_parameters(policy), tokens, rows * args.completion_tokens, flops)


_ALGORITHM: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.0},
    "rloo": {"kl_coef": 0.05},
    "ppo": {"kl_coef": 0.05, "critic_optimizer": {"learning_rate": 1e-6}},
}


class _Drawn:
    """Random token ids from one seed."""

    def __init__(self, vocab_size: int, args: argparse.Namespace) -> None:
        self._generator = torch.Generator().manual_seed(args.seed)
        self._vocab_size = vocab_size
        self._args = args

    def ids(self, length: int) -> list[int]:
        ids: list[int] = torch.randint(
            self._vocab_size, (length,), generator=self._generator
        ).tolist()
        return ids

    def prompt(self) -> list[int]:
        return self.ids(self._args.prompt_tokens)

    def completion(self) -> list[int]:
        return self.ids(self._args.completion_tokens)

    def pairs(self) -> list[Pair]:
        return [
            Pair(self.prompt(), self.completion(), self.completion())
            for _ in range(self._args.prompts)
        ]


def _rewards(rollouts: Sequence[Rollout]) -> RewardBreakdown:
    scores = torch.tensor([float(sum(r.completion_ids) % 7) for r in rollouts])
    return RewardBreakdown(scores=scores, total=scores, components={"drawn": scores})


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP a second (of a processor's time on the CPU) of a matrix product of 2,048 squared."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left = torch.randn(2048, 2048, device=device).to(dtype)
    right = torch.randn(2048, 2048, device=device).to(dtype)
    best = 0.0
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
            best = max(best, 2 * 2048**3 / (time.perf_counter() - wall))
        else:
            best = max(best, 2 * 2048**3 / (time.process_time() - cpu))
    return best


def report(
    args: argparse.Namespace, device: torch.device, work: Work, clock: Clock
) -> dict[str, Any]:
    """The JSON object."""
    seconds = clock.wall if device.type == "cuda" else clock.cpu
    total = sum(seconds.values())
    training = total - seconds.get("generate", 0.0) - seconds.get("weight sync", 0.0)
    peak = measured_peak(device, args.precision)
    found: dict[str, Any] = {
        "algorithm": args.algorithm,
        "model": args.model,
        "num_parameters": work.num_parameters,
        "precision": args.precision,
        "engine": args.engine if work.generated_tokens else None,
        "shape": {
            "prompts": args.prompts,
            "group_size": args.group_size if work.generated_tokens else None,
            "prompt_tokens": args.prompt_tokens,
            "completion_tokens": args.completion_tokens,
            "micro_batch_tokens": args.micro_batch_tokens,
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": args.steps,
        "seconds_a_step": sum(clock.wall.values()) / args.steps,
        "cpu_seconds_a_step": sum(clock.cpu.values()) / args.steps,
        "cpu_seconds_by_part": {k: round(v / args.steps, 4) for k, v in clock.cpu.items()},
        "seconds_by_part": {k: round(v / args.steps, 4) for k, v in clock.wall.items()},
        "training_tokens": work.training_tokens,
        "training_tokens_a_cpu_second": work.training_tokens * args.steps / training,
        "tokens_a_cpu_second": work.training_tokens * args.steps / total,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "model_flops_a_step": work.model_flops,
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
    parser.add_argument("--prompts", type=int, default=8, help="records, pairs or prompts a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--engine", choices=("native", "vllm"), default="native")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()

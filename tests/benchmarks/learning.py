"""What each way of assigning credit learns from the same start and the same number of samples.

    python -m tests.benchmarks.learning --home DIR > learning.json
    python -m tests.benchmarks.learning --markdown learning.json

The stages are those of a pipeline run, each in a process of its own, through one store: the SFT
policy and the process reward model are trained once for a task and seed, and a benchmark that was
interrupted goes on where it was. Prints one JSON document; progress goes to the standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq

from flows.graph import Node, build_graph
from flows.recipes import load_recipe
from infra.files import write_atomic
from infra.launch import StageFailed, run_stage
from infra.store import Store
from infra.tracking import read_metrics
from schemas.artifacts import (
    EVALUATION_RECORDS_FILE,
    AnyArtifact,
    Artifact,
    DatasetArtifact,
    EvaluationReport,
    PolicyCheckpoint,
)
from schemas.base import UserError
from schemas.fingerprint import fingerprint
from schemas.pipeline import PipelineConfig
from schemas.requests import (
    AnyRequest,
    EvaluateRequest,
    SamplePreferencesRequest,
    StageRequest,
    TrainRLRequest,
)
from schemas.rewards import RewardConfig

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
INTERVALS = (
    f"{CONFIDENCE:.0%} percentile bootstrap over the held-out records ({NUM_RESAMPLES} resamples); "
    "over several seeds, of each record's mean over the seeds"
)

_BYTES_TRAINED = 16
"""Of a trained float32 parameter: weight, gradient, and Adam's two moments."""
_BYTES_FROZEN = 4


@dataclass(frozen=True)
class Task:
    """The recipe's task, or a change of it."""

    title: str
    overrides: tuple[str, ...] = ()


def _chain(min_terms: int, max_terms: int, slip: float, max_completion: int) -> tuple[str, ...]:
    """The recipe's arithmetic with other lengths, and slips rare enough to be right half of it."""
    max_length = max_completion + 2 * max_terms + 2
    every = ("evaluation", "demonstrations", "prompts", "step_labels", "step_labels_held_out")
    sloppy = ("demonstrations", "step_labels", "step_labels_held_out")
    return (
        *(f"data.{split}.arguments.min_terms={min_terms}" for split in every),
        *(f"data.{split}.arguments.max_terms={max_terms}" for split in every),
        *(f"data.{split}.arguments.slip_probability={slip}" for split in sloppy),
        f"sft.max_length={max_length}",
        f"process_reward_model.max_length={max_length}",
        f"rl.dpo.max_length={max_length}",
        f"rl.online.sampling.max_completion_tokens={max_completion}",
        f"evaluation.sampling.max_completion_tokens={max_completion}",
    )


TASKS = {
    "quickstart": Task("the recipe's task, 3 to 4 operations"),
    "long-chain": Task("6 to 7 operations, slips with probability 0.1", _chain(7, 8, 0.1, 80)),
}


@dataclass(frozen=True)
class Method:
    """An algorithm, what it is rewarded with, and what its credit is for."""

    title: str
    reward: str
    credit: str
    overrides: tuple[str, ...]
    verifier: bool = True
    """Whether the verifier is part of the reward in training; in the evaluation it always is."""


# Nothing is promoted here, and some methods leave out rewards that a recipe's gate judges.
_NO_GATE = "gate={}"
_VERIFIER = ("reward.process=null", "process_reward_model=null")
_STEPS = ("reward.process.credit=steps",)
_MINIMUM = ("reward.process.credit=aggregate", "reward.process.aggregate=min")

METHODS = {
    "grpo-both": Method(
        "GRPO", "verifier + PRM steps", "response + step", ("rl.algorithm=grpo", *_STEPS)
    ),
    "grpo-verifier": Method("GRPO", "verifier", "response", ("rl.algorithm=grpo", *_VERIFIER)),
    "ppo-token": Method(
        "PPO", "verifier", "token", ("rl.algorithm=ppo", "rl.ppo.credit=token", *_VERIFIER)
    ),
    "ppo-response": Method(
        "PPO", "verifier", "response", ("rl.algorithm=ppo", "rl.ppo.credit=response", *_VERIFIER)
    ),
    "rloo": Method("RLOO", "verifier", "response", ("rl.algorithm=rloo", *_VERIFIER)),
    "dpo": Method(
        "DPO",
        "pairs ranked by the verifier",
        "implicit",
        ("rl.algorithm=dpo", "rl.dpo.pairs=sampled", *_VERIFIER),
    ),
    "ppo-auto": Method(
        "PPO", "verifier", "auto", ("rl.algorithm=ppo", "rl.ppo.credit=auto", *_VERIFIER)
    ),
    "grpo-process": Method("GRPO", "PRM steps", "step", ("rl.algorithm=grpo", *_STEPS), False),
    "grpo-both-min": Method(
        "GRPO", "verifier + PRM min", "response", ("rl.algorithm=grpo", *_MINIMUM)
    ),
    "grpo-process-potential": Method(
        "GRPO",
        "PRM steps, differences",
        "step",
        ("rl.algorithm=grpo", *_STEPS, "reward.process.potential_based=true"),
        False,
    ),
    "ppo-token-both": Method(
        "PPO",
        "verifier + PRM steps",
        "token",
        ("rl.algorithm=ppo", "rl.ppo.credit=token", *_STEPS),
    ),
}
"""In the order in which they run, so that what comes first can be compared early."""


@dataclass(frozen=True)
class Plan:
    """What is measured, from which recipe, and where the work happens."""

    home: Path
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: str = "quickstart"
    num_steps: int | None = None
    overrides: tuple[str, ...] = ()
    only_finished: bool = False

    def config(self, task: str, method: str, seed: int) -> PipelineConfig:
        """The recipe of one run."""
        overrides = [
            *TASKS[task].overrides,
            # The outcome model is part of no method, and no traces are kept: nothing but the
            # method itself shall cost time.
            "reward_model=null",
            "rl.online.trace.num_groups=0",
            f"seed={seed}",
            *self.overrides,
        ]
        if self.num_steps is not None:
            overrides.append(f"rl.online.num_steps={self.num_steps}")
        if method == "dpo":
            # As many completions as online RL draws, all of them before the first update.
            config = load_recipe(self.recipe, [*overrides, _NO_GATE])
            asked = config.sample_preferences
            samples = asked.samples_per_prompt if asked is not None else 4
            overrides.append(f"sample_preferences.num_prompts={num_completions(config) // samples}")
            overrides.append(f"sample_preferences.samples_per_prompt={samples}")
        return load_recipe(self.recipe, [*overrides, *METHODS[method].overrides, _NO_GATE])


class NotFinished(Exception):
    """A stage that would have to run, where only finished work is asked for."""


class Costs:
    """What each stage took, over all attempts: `costs/<fingerprint>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, fingerprint: str) -> dict[str, Any]:
        """The costs of a stage's work; zeros where nothing is known."""
        path = self.folder / f"{fingerprint}.json"
        if not path.exists():
            return {"wall_seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_bytes": 0, "attempts": 0}
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @contextmanager
    def measured(self, fingerprint: str) -> Iterator[dict[str, Any]]:
        """Add what the block takes, of processes that it starts and waits for, to the costs."""
        costs = self.read(fingerprint)
        wall, cpu = time.monotonic(), _children_cpu_seconds()
        try:
            yield costs
        finally:
            costs["wall_seconds"] += time.monotonic() - wall
            costs["cpu_seconds"] += _children_cpu_seconds() - cpu
            costs["attempts"] += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / f"{fingerprint}.json", json.dumps(costs))


class Benchmark:
    """Runs the plan through one store."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.say = say
        self.store = Store(plan.home / "store")
        self.costs = Costs(plan.home / "costs")
        self.document: dict[str, Any] = {"runs": [], "shared": [], "failures": []}
        self._right: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}

    def run(self) -> dict[str, Any]:
        """Every run of the plan, seed by seed; a run that fails is noted and passed over."""
        plan = self.plan
        for seed in plan.seeds:
            for task in plan.tasks:
                for method in plan.methods:
                    try:
                        self.document["runs"].append(self._run(task, method, seed))
                    except NotFinished:
                        continue
                    except (UserError, StageFailed) as error:
                        self.say(f"{task} {method} seed {seed} failed: {error}")
                        failure = {"task": task, "method": method, "seed": seed}
                        self.document["failures"].append(failure | {"error": str(error)})
        return self._described() | self.document | {"summary": self._summary()}

    def _described(self) -> dict[str, Any]:
        plan = self.plan
        config = plan.config(plan.tasks[0], "grpo-verifier", plan.seeds[0])
        assert config.rl.online is not None
        return {
            "benchmark": "learning",
            "recipe": plan.recipe,
            "overrides": list(plan.overrides),
            "num_steps": config.rl.online.num_steps,
            "prompts_per_step": config.rl.online.prompts_per_step,
            "group_size": config.rl.online.group_size,
            "intervals": INTERVALS,
            "machine": {
                "cpus": os.cpu_count(),
                "threads": config.compute.num_threads,
                "python": platform.python_version(),
                "system": platform.platform(),
            },
            "tasks": {name: TASKS[name].title for name in plan.tasks},
            "methods": {
                name: {key: getattr(METHODS[name], key) for key in ("title", "reward", "credit")}
                for name in plan.methods
            },
        }

    def _run(self, task: str, method: str, seed: int) -> dict[str, Any]:
        config = self.plan.config(task, method, seed)
        artifacts: dict[str, Artifact] = {}
        for node in build_graph(config, store=self.store.root, find_incumbent=lambda _: None):
            if node.name != "promote":
                request = _request(node, artifacts, METHODS[method])
                artifacts[node.name] = self._artifact(request, f"{task} {method} seed {seed}")
        self._note_shared(task, seed, artifacts)
        report, policy = artifacts["evaluate"], artifacts["train_rl"]
        assert isinstance(report, EvaluationReport) and isinstance(policy, PolicyCheckpoint)
        right = self._right_by_record(report)
        self._right.setdefault((task, method), []).append(right)
        before, after = right["baseline"], right["candidate"]
        samples = artifacts.get("sample_preferences")
        own = [policy.fingerprint, *([samples.fingerprint] if samples else [])]
        costs = [self.costs.read(fingerprint) for fingerprint in own]
        generated = num_completions(config)
        lines = [line.metrics for line in self._metrics(policy)]
        run = {
            "task": task,
            "method": method,
            "seed": seed,
            "pass@1": float(after.mean()),
            "pass@1_interval": bootstrap_interval(after),
            "sft_pass@1": float(before.mean()),
            "gain": float((after - before).mean()),
            "gain_interval": bootstrap_interval(after - before),
            "kl": report.candidate.kl,
            "length": report.candidate.length,
            "sft_length": report.baseline.length,
            "truncated_fraction": report.candidate.truncated_fraction,
            "num_updates": policy.num_steps,
            "completions_generated": generated,
            "tokens_generated": _tokens(lines, config)
            if samples is None
            # The pairs alone are kept: their number times the length on the held-out records.
            else round(generated * report.baseline.length),
            "tokens_generated_is_estimated": samples is not None,
            "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
            "state_memory_bytes": state_memory(policy.num_parameters, config),
            "wall_seconds": sum(cost["wall_seconds"] for cost in costs),
            "cpu_seconds": sum(cost["cpu_seconds"] for cost in costs),
            "training": _training(lines),
        }
        self.say(
            f"{task} {method} seed {seed}: pass@1 {run['sft_pass@1']:.3f} -> {run['pass@1']:.3f}, "
            f"KL {run['kl']:.2f}, {run['cpu_seconds']:.0f} CPU s"
        )
        return run

    def _artifact(self, request: StageRequest, label: str) -> AnyArtifact:
        found = self.store.find(request.fingerprint)
        if found is not None:
            return found
        stage = cast(AnyRequest, request).stage
        if self.plan.only_finished:
            raise NotFinished(stage)
        self.say(f"{label}: {stage}")
        own = request.fingerprint
        with self.store.lock(own, on_wait=self.say), self.costs.measured(own) as costs:
            outcome = run_stage(
                cast(AnyRequest, request), store=self.store, on_line=lambda line: None
            )
            peak = outcome.peak_memory_bytes or 0
            costs["peak_memory_bytes"] = max(costs["peak_memory_bytes"], peak)
        return outcome.artifact

    def _note_shared(self, task: str, seed: int, artifacts: dict[str, Artifact]) -> None:
        """Stages that several methods share, with their costs, once each."""
        noted = [(row["task"], row["seed"], row["stage"]) for row in self.document["shared"]]
        for stage in ("train_sft", "train_process_reward_model"):
            if stage in artifacts and (task, seed, stage) not in noted:
                own = artifacts[stage]
                row = {"task": task, "seed": seed, "stage": stage, "metrics": own.metrics}
                self.document["shared"].append(row | self.costs.read(own.fingerprint))

    def _right_by_record(self, report: EvaluationReport) -> dict[str, np.ndarray]:
        """Share of right answers of each record, records in one order, by model."""
        table = pq.read_table(self.store.path(report) / EVALUATION_RECORDS_FILE)
        found: dict[str, dict[str, list[bool]]] = {}
        columns = (table.column(name).to_pylist() for name in ("model", "record", "correct"))
        for model, record, correct in zip(*columns, strict=True):
            found.setdefault(model, {}).setdefault(record, []).append(correct)
        return {
            model: np.array([np.mean(records[record]) for record in sorted(records)])
            for model, records in found.items()
        }

    def _metrics(self, policy: PolicyCheckpoint) -> list[Any]:
        return read_metrics(self.store.work_dir(policy.fingerprint) / "metrics.jsonl")

    def _summary(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for (task, method), right in self._right.items():
            runs = [
                run
                for run in self.document["runs"]
                if (run["task"], run["method"]) == (task, method)
            ]
            after = np.mean([own["candidate"] for own in right], axis=0)
            before = np.mean([own["baseline"] for own in right], axis=0)
            means = {
                name: float(np.mean([run[name] for run in runs]))
                for name in (
                    *("pass@1", "sft_pass@1", "gain", "kl", "length", "sft_length"),
                    *("truncated_fraction", "tokens_generated", "peak_memory_bytes"),
                    *("state_memory_bytes", "wall_seconds", "cpu_seconds"),
                )
            }
            rows.append(
                {"task": task, "method": method, "seeds": [run["seed"] for run in runs]}
                | means
                | {
                    "pass@1_interval": bootstrap_interval(after),
                    "pass@1_by_seed": [run["pass@1"] for run in runs],
                    "gain_interval": bootstrap_interval(after - before),
                    "training": _mean_of_dicts([run["training"] for run in runs]),
                }
            )
        return rows


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """Percentile bootstrap of the mean (Efron and Tibshirani 1993, chapter 13), always alike."""
    array = np.asarray(values, dtype=float)
    if array.size == 0:
        raise ValueError("there is no interval around nothing: give at least one value")
    picks = np.random.default_rng(0).integers(array.size, size=(num_resamples, array.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(array[picks].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def num_completions(config: PipelineConfig) -> int:
    """Completions that online RL draws, which is the budget of every method."""
    online = config.rl.online
    assert online is not None
    return online.num_steps * online.prompts_per_step * online.group_size


def state_memory(num_parameters: int, config: PipelineConfig) -> int:
    """Bytes of all the models that training holds, with gradients and Adam's moments; computed.

    On a model this small the peak of the process is interpreter and activations; on a large one
    this is what decides. DPO drops its reference once its logprobs are computed.
    """
    trained, frozen = 1, 0
    if config.rl.algorithm != "dpo":
        frozen += 1 + (config.reward.process is not None)
    if config.rl.algorithm == "ppo":
        trained += 1
    return num_parameters * (trained * _BYTES_TRAINED + frozen * _BYTES_FROZEN)


def markdown(document: dict[str, Any]) -> str:
    """One table for each task, the best method first."""
    completions = document["num_steps"] * document["prompts_per_step"] * document["group_size"]
    parts = []
    for task, title in document["tasks"].items():
        rows = [row for row in document["summary"] if row["task"] == task]
        if not rows:
            continue
        rows.sort(key=lambda row: -row["pass@1"])
        sft = sorted(100 * row["sft_pass@1"] for row in rows)
        lines = [
            f"**{task}** ({title}). {completions} completions a run "
            f"({document['num_steps']} steps x {document['prompts_per_step']} prompts x "
            f"{document['group_size']}); SFT policy: pass@1 {_span(sft[0], sft[-1])}.",
            "",
            "| method | reward | credit | pass@1 (95% interval) | each seed | gain | KL | length "
            "| tokens | peak memory | model state | CPU s | wall s |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(_row(row, document["methods"][row["method"]]) for row in rows),
        ]
        parts.append("\n".join(lines))
        critics = [row for row in rows if "critic/explained_variance" in row["training"]]
        if critics:
            parts.append("\n".join(map(_critic_line, critics)))
        shared = [row for row in document["shared"] if row["task"] == task]
        if shared:
            parts.append("\n".join(_shared_lines(shared)))
    return "\n\n".join(parts) + "\n"


def _span(low: float, high: float) -> str:
    texts = [f"{low:.1f}%", f"{high:.1f}%"]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _row(row: dict[str, Any], method: dict[str, str]) -> str:
    low, high = row["pass@1_interval"]
    cells = [
        method["title"],
        method["reward"],
        method["credit"],
        f"{100 * row['pass@1']:.1f}% ({100 * low:.1f} to {100 * high:.1f})",
        ", ".join(f"{100 * value:.1f}" for value in row["pass@1_by_seed"]),
        f"{100 * row['gain']:+.1f}",
        f"{row['kl']:.2f}",
        f"{row['length']:.1f}",
        f"{row['tokens_generated'] / 1000:.0f}k",
        f"{row['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"{row['state_memory_bytes'] / 2**20:.1f} MiB",
        f"{row['cpu_seconds']:.0f}",
        f"{row['wall_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _critic_line(row: dict[str, Any]) -> str:
    training = row["training"]
    return (
        f"- Critic of {row['method']}: explained variance "
        f"{training['critic/explained_variance_first']:.2f} in the first quarter of the steps, "
        f"{training['critic/explained_variance']:.2f} in the last; token-level credit in "
        f"{training['token_credit_share']:.0%} of the steps."
    )


def _shared_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for stage, title in (
        ("train_sft", "SFT policy"),
        ("train_process_reward_model", "Process reward model"),
    ):
        own = [row for row in rows if row["stage"] == stage]
        if not own:
            continue
        text = f"- {title}, shared: {np.mean([row['cpu_seconds'] for row in own]):.0f} CPU s a seed"
        for name in ("step_accuracy", "first_error_f1"):
            found = [row["metrics"][name] for row in own if name in row["metrics"]]
            if found:
                text += f", {name.replace('_', ' ')} {np.mean(found):.3f}"
        yield f"{text}."


def _request(node: Node, artifacts: dict[str, Artifact], method: Method) -> StageRequest:
    """The stage's request, with what a recipe cannot say: train without the verifier.

    Every policy is evaluated by the verifier alone, whatever it was trained with.
    """
    request = node.make(artifacts)
    if isinstance(request, TrainRLRequest) and request.reward is not None and not method.verifier:
        reward = RewardConfig(process=request.reward.process)
        request = request.model_copy(update={"reward": reward, "sources": {}})
    if isinstance(request, EvaluateRequest):
        reward = RewardConfig(verifier=request.reward.verifier)
        request = request.model_copy(update={"reward": reward, "process_reward_model": None})
    if isinstance(request, SamplePreferencesRequest):
        prompts = artifacts["prepare_data:prompts"]
        assert isinstance(prompts, DatasetArtifact)
        if prompts.num_records < request.config.num_prompts:
            raise UserError(
                f"data.prompts has {prompts.num_records} prompts, fewer than the "
                f"{request.config.num_prompts} that preferences are sampled for: "
                "add prompts, or lower --num-steps"
            )
    return request.model_copy(update={"fingerprint": fingerprint(request)})


def _training(lines: list[dict[str, float]]) -> dict[str, float]:
    """What is worth knowing of the curves: means over the last quarter of the steps."""
    quarter = max(len(lines) // 4, 1)
    names = (
        *("reward/verifier", "reward/process", "critic/explained_variance", "entropy"),
        *("groups/zero_variance_fraction", "completions/num_steps"),
    )
    found = {
        name: float(np.mean([line[name] for line in lines[-quarter:]]))
        for name in names
        if lines and name in lines[-1]
    }
    if "critic/explained_variance" in found:
        first = [line["critic/explained_variance"] for line in lines[:quarter]]
        found["critic/explained_variance_first"] = float(np.mean(first))
        found["token_credit_share"] = float(np.mean([line["credit/mode"] == 1 for line in lines]))
    return found


def _tokens(lines: list[dict[str, float]], config: PipelineConfig) -> int:
    online = config.rl.online
    assert online is not None
    per_step = online.prompts_per_step * online.group_size
    return round(sum(line["completions/length"] for line in lines) * per_step)


def _mean_of_dicts(dicts: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([own[name] for own in dicts])) for name in dicts[0]}


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.learning")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print a result's tables")
    parser.add_argument("--home", type=Path, default=Path("learning-benchmark"))
    parser.add_argument("--recipe", default="quickstart", help="name or path")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-steps", type=int, help="rollout batches of a run, for all methods")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    parser.add_argument(
        "--only-finished", action="store_true", help="report what is done; start nothing"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or print the tables of one that has run."""
    options = _parser().parse_args(arguments)
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text())), end="")
        return 0
    plan = Plan(
        home=options.home.absolute(),
        tasks=tuple(options.tasks),
        methods=tuple(options.methods),
        seeds=tuple(options.seeds),
        recipe=options.recipe,
        num_steps=options.num_steps,
        overrides=tuple(options.overrides),
        only_finished=options.only_finished,
    )
    benchmark = Benchmark(plan, lambda text: print(text, file=sys.stderr, flush=True))
    try:
        document = benchmark.run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

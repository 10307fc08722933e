"""The learning benchmark: its arithmetic, its tables, and a run of the whole on a tiny recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.store import Store
from schemas.base import UserError
from tests.benchmarks.learning import (
    METHODS,
    TASKS,
    Costs,
    Plan,
    bootstrap_interval,
    main,
    markdown,
    num_completions,
    state_memory,
)

ROOT = Path(__file__).parents[2]
RUN_KEYS = {
    *("task", "method", "seed", "pass@1", "pass@1_interval", "sft_pass@1", "gain"),
    *("gain_interval", "kl", "length", "sft_length", "truncated_fraction", "num_updates"),
    *("completions_generated", "tokens_generated", "tokens_generated_is_estimated"),
    *("peak_memory_bytes", "state_memory_bytes", "wall_seconds", "cpu_seconds", "training"),
}


def plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "home": Path("unused"),
        "tasks": tuple(TASKS),
        "methods": tuple(METHODS),
        "seeds": (0,),
    }
    return Plan(**settings | changes)


def test_an_interval_holds_the_mean_and_shrinks_with_the_records() -> None:
    few = bootstrap_interval([0.0, 0.5, 1.0, 1.0] * 10)
    many = bootstrap_interval([0.0, 0.5, 1.0, 1.0] * 1000)
    assert few[0] < many[0] < 0.625 < many[1] < few[1]
    # Standard error of the mean of 4000: sqrt(0.171875 / 4000) = 0.00655; 1.96 of them each way.
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.00655, rel=0.05)


def test_an_interval_is_the_same_every_time_and_a_point_without_variance() -> None:
    values = np.linspace(0, 1, 50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_every_task_is_a_valid_recipe(task: str, method: str) -> None:
    config = plan(num_steps=7).config(task, method, 3)
    assert config.seed == 3
    assert num_completions(config) == 7 * 32 * 8
    assert config.reward_model is None  # part of no method
    assert config.reward.verifier is not None  # the evaluation's


def test_dpo_ranks_as_many_completions_as_the_others_draw() -> None:
    config = plan().config("quickstart", "dpo", 0)
    asked = config.sample_preferences
    assert asked is not None
    assert asked.num_prompts * asked.samples_per_prompt == num_completions(config)


def test_the_methods_of_one_task_share_the_policy_that_they_start_from() -> None:
    for task in TASKS:
        configs = [plan().config(task, method, 0) for method in METHODS]
        assert len({config.sft.model_dump_json() for config in configs}) == 1
        assert len({config.data.model_dump_json() for config in configs}) == 1
        assert len({config.evaluation.model_dump_json() for config in configs}) == 1


def test_the_state_of_a_critic_counts_as_a_second_trained_model() -> None:
    def memory(method: str) -> int:
        return state_memory(1000, plan().config("quickstart", method, 0))

    assert memory("dpo") == 16_000
    assert memory("rloo") == memory("grpo-verifier") == 20_000  # and a frozen reference
    assert memory("grpo-both") == 24_000  # and a frozen process reward model
    assert memory("ppo-token") == 36_000  # the critic with its gradients and moments


def test_costs_add_up_over_attempts_also_of_one_that_fails(tmp_path: Path) -> None:
    costs = Costs(tmp_path)

    def burn() -> None:
        with costs.measured("a") as own:
            own["peak_memory_bytes"] = 5
            subprocess.run([sys.executable, "-c", "sum(range(10**6))"], check=True)

    burn()
    first = costs.read("a")
    assert first["wall_seconds"] > 0 and first["cpu_seconds"] > 0
    with pytest.raises(RuntimeError), costs.measured("a"):
        raise RuntimeError
    second = costs.read("a")
    assert second["attempts"] == 2 and second["peak_memory_bytes"] == 5
    assert second["wall_seconds"] > first["wall_seconds"]
    assert costs.read("b")["attempts"] == 0


def summary_row(method: str, score: float, **training: float) -> dict[str, Any]:
    return {
        "task": "quickstart",
        "method": method,
        "seeds": [0, 1],
        "pass@1": score,
        "pass@1_interval": [score - 0.02, score + 0.02],
        "pass@1_by_seed": [score - 0.01, score + 0.01],
        "sft_pass@1": 0.5,
        "gain": score - 0.5,
        "kl": 0.654,
        "length": 27.04,
        "tokens_generated": 277_400.0,
        "peak_memory_bytes": 600 * 2**20,
        "state_memory_bytes": 3 * 2**20,
        "wall_seconds": 41.2,
        "cpu_seconds": 39.7,
        "training": training,
    }


def document() -> dict[str, Any]:
    critic = {
        "critic/explained_variance_first": 0.1,
        "critic/explained_variance": 0.42,
        "token_credit_share": 0.75,
    }
    return {
        "num_steps": 40,
        "prompts_per_step": 32,
        "group_size": 8,
        "tasks": {"quickstart": "short", "long-chain": "long"},
        "methods": {
            name: {"title": own.title, "reward": own.reward, "credit": own.credit}
            for name, own in METHODS.items()
        },
        "summary": [
            summary_row("dpo", 0.7),
            summary_row("grpo-verifier", 0.9),
            summary_row("ppo-auto", 0.8, **critic),
        ],
        "shared": [
            {
                "task": "quickstart",
                "stage": "train_process_reward_model",
                "cpu_seconds": 30.0,
                "metrics": {"step_accuracy": 0.98, "first_error_f1": 0.96},
            }
        ],
    }


def test_the_table_has_a_row_for_each_method_the_best_first() -> None:
    text = markdown(document())
    lines = text.splitlines()
    assert "10240 completions a run (40 steps x 32 prompts x 8)" in lines[0]
    assert "SFT policy: pass@1 50.0%." in lines[0]
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| GRPO", "| PPO", "| DPO"]
    assert {line.count("|") for line in lines if line.startswith("|")} == {14}
    assert rows[0] == (
        "| GRPO | verifier | response | 90.0% (88.0 to 92.0) | 89.0, 91.0 | +40.0 | 0.65 | 27.0 "
        "| 277k | 600 MiB | 3.0 MiB | 40 | 41 |"
    )
    assert "Critic of ppo-auto: explained variance 0.10" in text
    assert "token-level credit in 75% of the steps" in text
    assert "Process reward model, shared: 30 CPU s a seed, step accuracy 0.980" in text


def test_a_task_without_results_has_no_table() -> None:
    assert "long-chain" not in markdown(document())


def test_the_tables_of_a_file_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "learning.json"
    path.write_text(json.dumps(document()))
    assert main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out == markdown(document())


def test_nothing_is_started_where_only_finished_work_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--home", str(tmp_path), "--seeds", "0", "--only-finished"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == found["failures"] == found["summary"] == []
    assert not list(Store(tmp_path / "store").artifacts())


def test_an_unknown_recipe_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--home", str(tmp_path), "--recipe", "nowhere", "--only-finished"]
    assert main(arguments) == 2
    assert "there is no recipe nowhere" in capsys.readouterr().err
    with pytest.raises(UserError):
        plan(recipe="nowhere").config("quickstart", "rloo", 0)


@pytest.mark.slow
def test_the_command_measures_a_tiny_recipe_and_goes_on_from_what_is_done(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "tests.benchmarks.learning", "--home", str(tmp_path)),
        *("--recipe", str(ROOT / "tests" / "recipes" / "tiny.yaml"), "--tasks", "quickstart"),
        *("--methods", "grpo-process", "ppo-auto", "dpo", "--seeds", "0", "--num-steps", "2"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert [run["method"] for run in found["runs"]] == ["grpo-process", "ppo-auto", "dpo"]
    for run in found["runs"]:
        assert run.keys() == RUN_KEYS
        assert run["completions_generated"] == 2 * 8 * 4
        assert run["tokens_generated"] > 0
        assert run["peak_memory_bytes"] > run["state_memory_bytes"] > 0
        assert run["cpu_seconds"] > 0
        low, high = run["pass@1_interval"]
        assert low <= run["pass@1"] <= high
    process, auto, dpo = found["runs"]
    assert "reward/verifier" not in process["training"]
    assert "critic/explained_variance" in auto["training"]
    assert dpo["tokens_generated_is_estimated"]
    assert {row["stage"] for row in found["shared"]} == {"train_sft", "train_process_reward_model"}
    assert markdown(found).count("\n| ") == 1 + 3
    again = subprocess.run([*command, "--only-finished"], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(again.stdout) == found

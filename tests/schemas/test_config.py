"""Impossible combinations of a recipe are refused, with a message that names the fix."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.pipeline import PipelineConfig

SAMPLING = {"max_completion_tokens": 16}
OPTIMIZER = {"learning_rate": 1e-3}
TASK = "stages.tasks.arithmetic"


def generated(name: str) -> dict[str, Any]:
    """A data source that names a generator of the arithmetic task."""
    return {"generator": f"{TASK}:{name}", "arguments": {"count": 8, "seed": 0}}


def minimal_config() -> dict[str, Any]:
    """The smallest recipe: GRPO with a verifier on a built model."""
    return {
        "name": "test",
        "model": {"built": {"alphabet": "0123456789+-=#\n", "max_positions": 64}},
        "data": {
            "evaluation": generated("problems"),
            "demonstrations": generated("demonstrations"),
            "prompts": generated("problems"),
        },
        "sft": {"optimizer": OPTIMIZER, "max_length": 32},
        "reward": {"verifier": {"function": f"{TASK}:verify"}},
        "rl": {
            "algorithm": "grpo",
            "online": {"sampling": SAMPLING},
            "grpo": {"optimizer": OPTIMIZER},
        },
        "evaluation": {"sampling": SAMPLING},
        "registry": {"name": "test"},
    }


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The minimal recipe with values set by dotted path; None takes a value away."""
    config: dict[str, Any] = _unshared(minimal_config())
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = config
        for name in parents:
            section = section.setdefault(name, {})
        if value is None:
            section.pop(last, None)
        else:
            section[last] = _unshared(value)
    return config


def _unshared(value: Any) -> Any:
    """A copy in which no two sections are the same object."""
    return json.loads(json.dumps(value))


PAIRS = generated("preferences")
STEPS = generated("step_labels")
SECTION = {"optimizer": OPTIMIZER, "max_length": 32}
WITH_RM = {
    "reward_model": SECTION,
    "reward.outcome": {},
    "data.preferences": PAIRS,
    "data.preferences_held_out": PAIRS,
}
WITH_PRM = {
    "process_reward_model": SECTION,
    "reward.process": {},
    "data.step_labels": STEPS,
    "data.step_labels_held_out": STEPS,
}
DPO: dict[str, Any] = {
    "rl": {"algorithm": "dpo", "dpo": {"optimizer": OPTIMIZER, "max_length": 32}},
    "data.prompts": None,
    "data.preferences": PAIRS,
}
SAMPLE_PREFERENCES = {"num_prompts": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rl.online.lora": {"rank": 4}},
        {"rl.algorithm": "rloo", "rl.rloo": {"optimizer": OPTIMIZER}},
        {"rl.algorithm": "ppo", "rl.ppo": {"optimizer": OPTIMIZER, "critic_optimizer": OPTIMIZER}},
        {
            "rl.algorithm": "ppo",
            "rl.ppo": {"optimizer": OPTIMIZER, "critic_optimizer": OPTIMIZER},
            "rl.online.group_size": 1,
        },
        DPO,
        WITH_RM,
        WITH_PRM,
        {
            **DPO,
            "data.prompts": generated("problems"),
            "data.preferences": None,
            "rl.dpo.pairs": "sampled",
            "sample_preferences": SAMPLE_PREFERENCES,
        },
        {**WITH_PRM, "data.step_labels": None, "label_steps": {"num_prompts": 4}},
        {**WITH_RM, "data.preferences": None, "sample_preferences": SAMPLE_PREFERENCES},
        {"sft.max_length": 64},
        {
            "gate.limits": [
                {"metric": name, "max_regression": 0.1}
                for name in ("pass@1", "reward", "kl", "length", "truncated_fraction", "verifier")
            ]
        },
        {
            **WITH_RM,
            "gate.limits": [{"metric": "outcome", "min": 0}, {"metric": "proxy", "min": 0}],
        },
        {**WITH_PRM, "gate.reward_hacking": {"min_correlation": 0.2}},
        {"gate.slices": [{"field": "level", "min_primary": 0.5, "values": ["a", 1]}]},
    ],
)
def test_a_possible_recipe_is_taken(changes: dict[str, Any]) -> None:
    PipelineConfig.model_validate(changed(changes))


@pytest.mark.parametrize(
    ("changes", "fault", "fix"),
    [
        ({"rl.online.group_size": 1}, "grpo compares the completions", "must be at least 2, not 1"),
        (
            {
                "rl.algorithm": "rloo",
                "rl.rloo": {"optimizer": OPTIMIZER},
                "rl.online.group_size": 1,
            },
            "rloo compares the completions",
            "group_size must be at least 2",
        ),
        ({"rl.algorithm": "ppo"}, "section rl.ppo is missing", "add it"),
        ({"rl.online": None}, "grpo samples", "add section rl.online"),
        ({"rl.online.sampling.temperature": 0}, "explore greedily", "temperature above 0"),
        (
            {"rl.online.prompts_per_step": 5, "rl.online.num_mini_batches": 2},
            "prompts_per_step",
            "multiple of num_mini_batches",
        ),
        ({**DPO, "data.preferences": None}, "dpo learns from pairs", "add data.preferences"),
        (
            {"rl.online.lora": {"dropout": 0.1}},
            "lora.dropout is 0.1",
            "set it to 0",
        ),
        (
            {"rollout": {"engine": "vllm"}, "rl.online.max_policy_lag": 1},
            "samples while the policy trains",
            "set rollout.engine to vllm_server",
        ),
        (
            {"rollout": {"engine": "vllm_server", "servers": {"urls": ["http://host:8000"]}}},
            "read new weights from a folder",
            "add servers.weights_folder",
        ),
        (
            {"rollout": {"engine": "vllm_server", "servers": {"weights_folder": "/shared"}}},
            "weights_folder is for servers named by servers.urls",
            "drop it",
        ),
        (
            {
                "reward.engine": "vllm_server",
                "reward.servers": {"urls": ["http://h:1"], "weights_folder": "/shared"},
            },
            "served by the stage itself",
            "drop servers.urls",
        ),
        (
            {
                "rollout": {
                    "engine": "native",
                    "servers": {"urls": ["http://host:8000"], "weights_folder": "/shared"},
                }
            },
            "engine is native",
            "set it to vllm_server",
        ),
        (
            {
                "rollout": {
                    "engine": "vllm_server",
                    "servers": {"urls": ["http://h:1", "http://h:1"], "weights_folder": "/shared"},
                }
            },
            "servers.urls",
            "names a server twice",
        ),
        ({**DPO, "rl.dpo.pairs": "sampled"}, "pairs is sampled", "add section sample_preferences"),
        (
            {**DPO, "rl.dpo.loss": "ipo", "rl.dpo.label_smoothing": 0.1},
            "label_smoothing",
            "set it to 0",
        ),
        ({"data.prompts": None}, "grpo samples", "add data.prompts"),
        ({**WITH_RM, "reward_model": None}, "reward.outcome needs", "add section reward_model"),
        ({**WITH_RM, "data.preferences": None}, "needs pairs", "add data.preferences"),
        (
            {**WITH_RM, "data.preferences_held_out": None},
            "held-out pairs",
            "add data.preferences_held_out",
        ),
        (
            {**WITH_PRM, "process_reward_model": None},
            "reward.process needs",
            "add section process_reward_model",
        ),
        ({**WITH_PRM, "data.step_labels": None}, "needs step labels", "or section label_steps"),
        (
            {**WITH_PRM, "data.step_labels_held_out": None},
            "held-out steps",
            "add data.step_labels_held_out",
        ),
        ({**WITH_RM, "reward.verifier": None}, "measured by a verifier", "add reward.verifier"),
        ({"reward.verifier": None}, "reward needs", "at least one of verifier, outcome"),
        (
            {**DPO, "sample_preferences": SAMPLE_PREFERENCES},
            "sample_preferences samples from data.prompts",
            "add it",
        ),
        (
            {"sample_preferences": {"num_prompts": 4, "ranker": "outcome"}},
            "needs a reward model trained on data.preferences",
            "or rank with the verifier",
        ),
        ({"sft.max_length": 65}, "sft.max_length is 65", "raise model.built.max_positions"),
        (
            {"rl.online.sampling.max_completion_tokens": 65},
            "rl.online.sampling.max_completion_tokens is 65",
            "holds 64 tokens: lower it",
        ),
        (
            {"evaluation.sampling.max_completion_tokens": 65},
            "evaluation.sampling.max_completion_tokens is 65",
            "lower it",
        ),
        ({**DPO, "rl.dpo.max_length": 65}, "rl.dpo.max_length is 65", "lower it"),
        ({**WITH_RM, "reward_model.max_length": 65}, "reward_model.max_length is 65", "lower it"),
        (
            {"evaluation.num_samples": 2, "evaluation.pass_at": [1, 4]},
            "pass@4",
            "evaluation.num_samples is 2",
        ),
        ({"evaluation.pass_at": [2]}, "must contain 1", "pass@1"),
        ({"evaluation.sampling.temperature": 0}, "all alike", "num_samples to 1"),
        ({"model.hub": "a/b"}, "exactly one of built, path and hub", "it has built, hub"),
        (
            {"data.evaluation.path": "x.jsonl"},
            "exactly one of path, hub and generator",
            "it has path, generator",
        ),
        ({"data.evaluation": {}}, "exactly one of path", "it has none"),
        ({"data.prompts.digest_range": [0.5, 0.5]}, "digest_range", "low < high"),
        (
            {"data.prompts": {"path": "x.jsonl", "arguments": {"a": 1}}},
            "arguments are for",
            "drop them",
        ),
        ({"data.prompts": {"generator": "x.y"}}, "generator must be", "module:function"),
        (
            {"gate.limits": [{"metric": "outcome", "min": 0}]},
            "gate.limits.0.metric: the evaluation reports no metric outcome",
            "It reports pass@1, reward",
        ),
        (
            {"gate.limits": [{"metric": "pas@1", "min": 0}]},
            "no metric pas@1",
            "did you mean pass@1?",
        ),
        ({"gate.limits": [{"metric": "kl"}]}, "limit of kl", "at least one of min, max and"),
        (
            {"gate.limits": [{"metric": "kl", "min": 2, "max": 1}]},
            "limit of kl",
            "min 2.0 above max 1.0",
        ),
        ({"gate.slices": [{"field": "level"}]}, "slice level", "at least one of min_primary"),
        (
            {"gate.reward_hacking": {}},
            "compares a trained reward model with the verifier",
            "add reward.outcome or reward.process, or drop gate.reward_hacking",
        ),
    ],
)
def test_an_impossible_recipe_is_refused(changes: dict[str, Any], fault: str, fix: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PipelineConfig.model_validate(changed(changes))
    assert len(caught.value.errors()) == 1
    message = str(caught.value)
    assert fault in message
    assert fix in message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rl.online.grup_size": 4}, "rl.online.grup_size"),
        ({"surprise": 1}, "surprise"),
        ({"sft.max_length": "many"}, "sft.max_length"),
        ({"sft.optimizer.learning_rate": float("nan")}, "sft.optimizer.learning_rate"),
        ({"name": "a b"}, "name"),
    ],
)
def test_an_unfit_field_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PipelineConfig.model_validate(changed(changes))
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [field]


def test_sections_that_the_algorithm_never_reads_are_left_out() -> None:
    extra = {
        "rl.rloo": {"optimizer": OPTIMIZER},
        "rl.dpo": {"optimizer": OPTIMIZER, "max_length": 8},
    }
    plain = PipelineConfig.model_validate(minimal_config()).rl.chosen()
    assert PipelineConfig.model_validate(changed(extra)).rl.chosen() == plain
    assert plain.dpo is None
    assert plain.online is not None


def test_a_configuration_cannot_be_changed() -> None:
    config = PipelineConfig.model_validate(minimal_config())
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]


def test_shared_fixtures_are_not_changed_by_a_test() -> None:
    assert changed({"sft.max_length": 9})["sft"]["max_length"] == 9
    assert minimal_config()["sft"]["max_length"] == 32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"train_sft": None, "evaluate": None}),
        (30, {"train_sft": 30.0, "evaluate": 30.0}),
        ({"train_sft": 60, "train_rl": 7200}, {"train_sft": 60.0, "evaluate": None}),
    ],
)
def test_time_limits_are_for_all_stages_or_for_each(
    given: Any, expected: dict[str, float | None]
) -> None:
    compute = PipelineConfig.model_validate(
        {**minimal_config(), "compute": {"stage_timeout": given}}
    ).compute
    assert {stage: compute.timeout_of(stage) for stage in expected} == expected


@pytest.mark.parametrize("given", [0, {"train_sft": -1}, {"train_slf": 60}])
def test_a_time_limit_that_means_nothing_is_refused(given: Any) -> None:
    with pytest.raises(ValidationError, match="stage_timeout"):
        PipelineConfig.model_validate({**minimal_config(), "compute": {"stage_timeout": given}})

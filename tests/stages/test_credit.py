"""Traced rollouts, and the same rollouts under every estimator."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flows.credit import newest, render
from infra.code import created_by
from infra.store import Store
from schemas.artifacts import (
    CREDIT_SUMMARY_FILE,
    CREDIT_TABLE_FILE,
    TRACES_FILE,
    PolicyCheckpoint,
)
from schemas.base import UserError
from schemas.requests import CreditRequest, Runtime
from schemas.rl import GRPOConfig, OnlineConfig
from stages import credit
from stages.credit import EstimatorSettings, rescore, summarize
from stages.rl import grpo
from stages.rl.experience import TokenLoss
from stages.rl.traces import Traces, join_traces
from stages.rollout.types import Rollout
from tests.artifacts import CONTRACT
from tests.stages.fakes import MemoryTracker
from tests.stages.test_online import ALGORITHMS, rl_config, train
from tests.stages.test_rl_pages import OPTIMIZER, experience, ppo_config

NAPKIN = OnlineConfig.model_validate(
    {"num_steps": 5, "sampling": {"max_completion_tokens": 3}, "trace": {"num_groups": 1}}
)


def napkin(folder: Path, *, values: bool = True) -> pa.Table:
    """Two rollouts of 3 and 2 tokens with two steps and one step, traced at step 1.

    Scores 1 and 0, step rewards .5, 1 and 0; KL .1 a token, not in the reward; values .5.
    """
    found = experience(
        [1.0, 0.0, 9.0, 9.0],
        [3, 2, 3, 3],
        groups=[0, 0, 1, 1],
        steps=([[0.5, 1.0], [0.0], [1.0], [1.0]], [[0, 2], [1], [0], [0]]),
        kl=0.1,
        values=torch.full((4, 3), 0.5) if values else None,
    )
    config = GRPOConfig(optimizer=OPTIMIZER, eps=0.0)
    decided = replace(grpo.credit(found, config), td_errors=found.values)
    after = TokenLoss(
        torch.zeros(2, 3),
        torch.tensor([[False, True, False], [False] * 3]),
        torch.tensor([[1.0, 1.5, 1.0], [1.0] * 3]),
    )
    traces = Traces(folder, NAPKIN, lambda ids: "".join("?ab"[i] for i in ids))
    metrics = {"completions/num_steps": 1.5, "reward/mean": 0.5}
    assert found.ref_logprobs is not None
    traces.write(1, found, decided, after, found.ref_logprobs[:2], metrics)
    return pq.read_table(folder / "step-00000001.parquet")


def test_everything_is_aligned_by_token(tmp_path: Path) -> None:
    table = napkin(tmp_path)
    # Only the first group; one row a token: 3 and 2.
    columns = table.to_pydict()
    assert columns["group"] == [0] * 5
    assert columns["sample"] == [0, 0, 0, 1, 1]
    assert columns["position"] == [0, 1, 2, 0, 1]
    assert columns["token_id"] == [2] * 5
    assert columns["token"] == ["b"] * 5
    assert columns["prompt"] == ["a"] * 5
    assert columns["score"] == columns["reward/verifier"] == [1, 1, 1, 0, 0]
    assert columns["total"] == [1.5, 1.5, 1.5, 0.0, 0.0]
    assert columns["step_index"] == [0, 1, 1, 0, 0]
    assert columns["is_step_end"] == [True, False, True, False, True]
    assert columns["step_score"] == columns["step_reward"] == [0.5, None, 1.0, None, 0.0]
    # The score on the last token, and each step's reward on its own.
    assert columns["token_reward"] == [0.5, 0.0, 2.0, 0.0, 0.0]
    assert columns["kl"] == pytest.approx([0.1] * 5)
    assert columns["kl_coef"] == [0.0] * 5
    assert columns["ref_logprob"] == pytest.approx([-1.1] * 5)
    assert columns["old_logprob"] == columns["rollout_logprob"] == [-1.0] * 5
    assert columns["value"] == columns["td_error"] == [0.5] * 5
    assert columns["value_after"] == [5.0] * 5
    assert columns["ratio"] == [1.0, 1.5, 1.0, 1.0, 1.0]
    assert columns["clipped"] == [False, True, False, False, False]
    assert columns["credit_mode"] == ["step"] * 5
    assert columns["trained"] == [True] * 5
    assert columns["truncated"] == [False] * 5
    assert columns["return"] == columns["advantage_unwhitened"] == [None] * 5


def test_the_estimators_by_hand(tmp_path: Path) -> None:
    # z of scores 1, 0: .5 / sqrt(.5) = .7071. Leave-one-out of totals 1.5, 0: 1.5, -1.5.
    # Response-level of token rewards summed, 2.5 and 0: 2.5, -2.5.
    # GAE, lambda 1, values .5: reward to go less .5: 2.5 - .5, 2 - .5, 2 - .5; -.5, -.5.
    # Steps .5, 1, 0: mean .5, deviation .5: 0, 1, -1; the sums from here on: 1, 1, 1; -1, -1.
    table = rescore(napkin(tmp_path), EstimatorSettings(gae_lambda=1.0, eps=0.0))
    z = 0.5 / math.sqrt(0.5)
    expected = {
        "credit/gae": [2.0, 1.5, 1.5, -0.5, -0.5],
        "credit/response_level": [2.5, 2.5, 2.5, -2.5, -2.5],
        "credit/group_z_score": [z, z, z, -z, -z],
        "credit/leave_one_out": [1.5, 1.5, 1.5, -1.5, -1.5],
        "credit/process_supervised": [1.0, 1.0, 1.0, -1.0, -1.0],
    }
    for name, values in expected.items():
        assert table[name].to_pylist() == pytest.approx(values), name
    assert table["advantage"].to_pylist() == pytest.approx([1 + z] * 3 + [-1 - z] * 2)


def test_the_summary_by_hand(tmp_path: Path) -> None:
    summary = summarize(rescore(napkin(tmp_path), EstimatorSettings(gae_lambda=1.0, eps=0.0)))
    assert (summary["num_rollouts"], summary["num_tokens"]) == (2, 5)
    # GAE 2, 1.5, 1.5 | -.5, -.5: the mean is .8, so the sum of squares is
    # 1.44 + .49 + .49 + 1.69 + 1.69 = 5.8; within, around 5/3 and -.5: 1/9 + 1/36 + 1/36 = 1/6.
    own = summary["estimators"]["gae"]
    assert own["mean_abs"] == pytest.approx(6.0 / 5)
    assert own["within_response_share"] == pytest.approx(1 / 6 / 5.8)
    assert summary["estimators"]["leave_one_out"]["within_response_share"] == pytest.approx(0.0)
    assert summary["correlation"]["leave_one_out"]["response_level"] == pytest.approx(1.0)
    assert 0.9 < summary["correlation"]["gae"]["leave_one_out"] < 1.0
    assert summary["steps"] == [
        {"step": 1, "num_steps": 1.5, "num_steps_traced": 1.5, "reward": 0.5, "length": None}
    ]
    assert summary["step_count_drift"] == 0.0


def test_what_a_run_cannot_tell_stays_null(tmp_path: Path) -> None:
    table = napkin(tmp_path, values=False)
    alone = table.filter(pa.array([sample == 0 for sample in table["sample"].to_pylist()]))
    for part, missing in ((table, {"gae"}), (alone, set(credit.ESTIMATORS))):
        found = rescore(part, EstimatorSettings())
        null = {n for n in credit.ESTIMATORS if found[f"credit/{n}"].null_count == len(found)}
        assert null == missing
    summary = summarize(rescore(alone, EstimatorSettings()))
    assert set(summary["estimators"]) == {"training"}


def test_an_empty_completion_keeps_its_group_whole(tmp_path: Path) -> None:
    found = experience([1.0, 0.0], [2, 2])
    empty = Rollout([1], [], [], "stop", 0, 0)
    mask = torch.tensor([[True, True], [False, False]])
    found = replace(found, rollouts=[found.rollouts[0], empty], completion_mask=mask)
    decided = grpo.credit(found, GRPOConfig(optimizer=OPTIMIZER))
    after = TokenLoss(mask.float(), ~mask & False, torch.ones(2, 2))
    Traces(tmp_path, NAPKIN, str).write(1, found, decided, after, found.old_logprobs, {})
    table = rescore(pq.read_table(tmp_path / "step-00000001.parquet"), EstimatorSettings())
    assert table["position"].to_pylist() == [0, 1, None]
    assert table["trained"].to_pylist() == [True, True, False]
    assert table["credit/leave_one_out"].to_pylist() == [1.0, 1.0, 0.0]
    assert table["advantage"].to_pylist() == table["credit/group_z_score"].to_pylist()


def test_traces_are_kept_at_the_start_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    config = NAPKIN.model_copy(update={"num_steps": 24})
    traces = Traces(tmp_path, config, str)
    assert [step for step in range(24) if traces.due(step)] == [0, 10, 20, 23]
    off = config.model_copy(update={"trace": config.trace.model_copy(update={"num_groups": 0})})
    assert not any(Traces(tmp_path, off, str).due(step) for step in range(24))


def test_rewinding_forgets_later_steps(tmp_path: Path) -> None:
    napkin(tmp_path)
    for step in (11, 21):
        (tmp_path / f"step-{step:08d}.parquet").write_bytes(
            (tmp_path / "step-00000001.parquet").read_bytes()
        )
    Traces(tmp_path, NAPKIN, str).rewind(11)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001.parquet",
        "step-00000011.parquet",
    ]


GRPO_REWARD = {"optimizer": {"learning_rate": 1e-3}, "kl_coef": 0.1, "kl_in": "reward"}
RUNS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "grpo": ({"grpo": GRPO_REWARD}, "advantage", ["group_z_score", "process_supervised"]),
    "rloo": ({}, "advantage", ["leave_one_out"]),
    "token": ({"ppo": {"credit": "token"}}, "advantage_unwhitened", ["gae"]),
    "response": ({"ppo": {"credit": "response"}}, "advantage_unwhitened", ["response_level"]),
    "bootstrapped": (
        {"ppo": {"credit": "token", "bootstrap_truncated": True, "critic": "shared"}},
        "advantage_unwhitened",
        ["gae"],
    ),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_re_scoring_gives_what_training_used(
    tiny: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes, used, parts = RUNS[name]
    algorithm = name if name in ("grpo", "rloo") else "ppo"
    section = ALGORITHMS[algorithm][algorithm] | changes.get(algorithm, {})
    monkeypatch.setitem(ALGORITHMS, name, {"algorithm": algorithm, algorithm: section})
    trace = {"num_groups": 3, "every": 1}
    train(tiny, tiny_folder, tmp_path, MemoryTracker(), name, num_steps=3, trace=trace)
    assert join_traces(tmp_path / "traces", tmp_path / "traces.parquet")
    traces = pq.read_table(tmp_path / "traces.parquet")
    table = rescore(traces, EstimatorSettings.of(rl_config(name)))
    found = sum(table[f"credit/{part}"].to_numpy().astype("float64") for part in parts)
    assert found == pytest.approx(table[used].to_numpy(), rel=1e-5, abs=1e-6)
    assert set(table["step"].to_pylist()) == {1, 2, 3}
    # The update moved the policy, and the ratio is that after the update.
    last = table.filter(pa.array(table["step"].to_numpy() == 3))
    assert any(ratio != 1.0 for ratio in last["ratio"].to_pylist())
    if algorithm == "ppo":
        warm = table.filter(pa.array(table["step"].to_numpy() == 1))
        assert warm["ratio"].to_pylist() == pytest.approx([1.0] * len(warm), abs=1e-4)
    text = render(table, newest(table))
    assert "step 3, group 0, sample 0" in text
    for heading in ("response level", "process supervised", "leave one out", "ratio", "kl"):
        assert heading in text
    assert ("gae" in text) == (algorithm == "ppo")


def test_settings_are_the_runs_own() -> None:
    config = rl_config("grpo")
    assert config.grpo is not None
    batch = config.grpo.model_copy(update={"scale": "batch", "eps": 1e-6})
    found = EstimatorSettings.of(config.model_copy(update={"grpo": batch}))
    assert (found.scale, found.eps, found.gae_lambda) == ("group", 1e-6, 0.95)
    ppo = ppo_config(gamma=0.9, gae_lambda=0.8, bootstrap_truncated=True)
    config = rl_config("ppo").model_copy(update={"ppo": ppo})
    assert EstimatorSettings.of(config) == EstimatorSettings(0.9, 0.8, True)
    assert EstimatorSettings.of(rl_config("rloo")) == EstimatorSettings()


def policy_with(store: Store, traces: Path | None) -> PolicyCheckpoint:
    content = store.work_dir("policy") / "content"
    content.mkdir()
    (content / "config.json").write_text("{}")
    if traces is not None:
        join_traces(traces, content / TRACES_FILE)
    policy = PolicyCheckpoint(
        uri=store.content_uri("policy"),
        sha256=store.seal(content),
        fingerprint="policy",
        created_by=created_by(),
        algorithm="grpo",
        contract=CONTRACT,
        num_parameters=1,
        num_steps=1,
    )
    store.publish("policy", policy)
    return policy


def request(store: Store, policy: PolicyCheckpoint) -> CreditRequest:
    return CreditRequest(
        fingerprint="credit",
        runtime=Runtime(store=str(store.root)),
        config=rl_config("grpo"),
        policy=policy,
    )


def test_the_stage_needs_the_traces_and_no_model(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    napkin(tmp_path / "traces")
    asked = request(store, policy_with(store, tmp_path / "traces"))
    run_dir = store.work_dir("credit")
    report = credit.run(asked, run_dir=run_dir, tracker=MemoryTracker())
    store.publish("credit", report)
    assert store.find_verified("credit") == report
    assert (report.num_rollouts, report.steps) == (2, (1,))
    assert report.estimators == credit.ESTIMATORS
    assert report.parents == ("policy",)
    assert report.metrics["process_supervised/mean_abs"] == pytest.approx(1.0, abs=1e-3)
    folder = store.path(report)
    assert pq.read_table(folder / CREDIT_TABLE_FILE).num_rows == 5
    summary = json.loads((folder / CREDIT_SUMMARY_FILE).read_text())
    assert summary["settings"]["eps"] == 1e-4


def test_a_policy_without_traces_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    asked = request(store, policy_with(store, None))
    with pytest.raises(UserError, match=r"set rl.online.trace.num_groups above 0"):
        credit.run(asked, run_dir=store.work_dir("credit"), tracker=MemoryTracker())


def test_a_rollout_as_text(tmp_path: Path) -> None:
    table = rescore(napkin(tmp_path), EstimatorSettings(gae_lambda=1.0, eps=0.0))
    lines = render(table, 0).splitlines()
    assert lines[0] == "rollout 0 of 2: step 1, group 0, sample 0, credit by step"
    assert lines[1] == "reward/verifier 1.000, score 1.000, total 1.500"
    assert lines[2] == "prompt 'a'"
    assert " ".join(lines[5].split()) == (
        "0 b 0 end 0.500 0.500 0.100 0.500 0.500 0.500 1.000 1.707 2.000 2.500 0.707 1.500 1.000"
    )
    assert "1.500*" in lines[6]
    with pytest.raises(UserError, match="there is no rollout 2: the run kept 2, from 0 to 1"):
        render(table, 2)

"""Skips and rewinds in the online loop, on a tiny model: counted, and resumed to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infra.files import file_digest
from schemas.base import UserError
from schemas.rl import RolloutConfig
from stages import termination
from stages.models import load_policy, load_with_head
from stages.ordering import records_at
from stages.rewards.composition import RewardBreakdown
from stages.rl import online
from stages.rl.algorithms import online_algorithm
from stages.rl.experience import Credit, Experience
from stages.rl.held_out import HeldOutProbe, split_held_out
from stages.rl.rollouts import PromptRecord
from stages.rollout.engine import build_engine
from stages.rollout.types import Rollout
from stages.shared_critic import Critic, SharedCritic
from stages.stability import Unstable
from stages.tokenization import decode
from tests.stages.fakes import Killed, MemoryTracker
from tests.stages.test_online import (
    EVERY_ALGORITHM,
    prompts,
    rewarder,
    rl_config,
    traces_of,
)

SEED = 3
Weights = dict[str, Tensor]


class Mortal(MemoryTracker):
    """Kills the stage at the n-th report of metrics, before the checkpoint of that step."""

    def __init__(self, reports: int | None = None) -> None:
        super().__init__()
        self.left = reports

    def log_metrics(self, metrics: Any, step: int) -> None:
        super().log_metrics(metrics, step)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Killed


def batch(tokenizer: PreTrainedTokenizerBase, slot: int) -> list[list[int]]:
    """The prompts of the rollout batch at a place in the data order."""
    known = prompts(tokenizer)
    return [known[index].prompt_ids for index in records_at(3 * slot, 3, len(known), SEED)]


def poisoned(
    credit: Callable[[Experience, int], Credit], bad: Sequence[list[list[int]]]
) -> Callable[[Experience, int], Credit]:
    """Credit that is not a number for some rollout batches."""

    def assign(experience: Experience, step: int) -> Credit:
        found = credit(experience, step)
        drawn = [rollout.prompt_ids for rollout in experience.rollouts[::4]]
        if drawn in bad:
            return dataclasses.replace(found, advantages=found.advantages * math.nan)
        return found

    return assign


class Scripted:
    """A rewarder whose rewards rise, and whose verdict on held-out prompts is scripted."""

    def __init__(self, inner: Any, tokenizer: Any, accuracy: dict[int, float], risen: int) -> None:
        self.inner = inner
        self.accuracy = accuracy
        # Rising over the first batches, and falling behind them.
        places = [*reversed(range(risen, 20)), *range(risen)]
        self.bonus = {
            str(batch(tokenizer, slot)): float(slot if slot < risen else -10 * slot)
            for slot in places
        }

    def __call__(self, rollouts: Sequence[Rollout], records: Any) -> RewardBreakdown:
        found: RewardBreakdown = self.inner(rollouts, records)
        bonus = self.bonus[str([rollout.prompt_ids for rollout in rollouts[::4]])]
        return dataclasses.replace(found, scores=found.scores + bonus, total=found.total + bonus)

    def verify(self, rollouts: Sequence[Rollout], records: Any) -> Tensor:
        share = self.accuracy[rollouts[0].policy_version]
        right = round(share * len(rollouts))
        return torch.tensor([1.0] * right + [0.0] * (len(rollouts) - right))


def train(
    tiny: Any,
    folder: Path,
    run_dir: Path,
    tracker: MemoryTracker,
    algorithm: str,
    *,
    bad_slots: Sequence[int] = (),
    script: Callable[[Any], Any] = lambda inner: inner,
    held_out: Sequence[PromptRecord] = (),
    **changes: Any,
) -> tuple[Weights, online.OnlineResult | None]:
    _, tokenizer = tiny
    config = rl_config(algorithm, **changes)
    assert config.online is not None
    device = torch.device("cpu")
    functions = online_algorithm(config)
    bad = [batch(tokenizer, slot) for slot in bad_slots]
    functions = dataclasses.replace(functions, credit=poisoned(functions.credit, bad))
    policy = load_policy(folder, device)
    critic: Critic | None = None
    if functions.critic is not None and functions.critic.shared_weight is not None:
        critic = SharedCritic(policy)
    elif functions.critic is not None:
        critic = load_with_head(folder, "value", seed=0)
    engine = build_engine(
        RolloutConfig(max_batch_size=5),
        model=policy,
        model_folder=folder,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    result = None
    with contextlib.suppress(Killed):
        result = online.train(
            online.Models(policy, load_policy(folder, device).eval(), critic),
            functions,
            engine,
            script(rewarder(tokenizer, folder)),
            prompts(tokenizer),
            held_out,
            config.online,
            decode=partial(decode, tokenizer),
            engine_is_exact=True,
            seed=SEED,
            run_dir=run_dir,
            tracker=tracker,
        )
    return dict(policy.state_dict()), result


def equal(left: Weights, right: Weights) -> bool:
    return all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_skipped_step_leaves_the_weights(
    tiny: Any, tiny_folder: Path, tmp_path: Path, algorithm: str
) -> None:
    skip = {"stability": {"non_finite": "skip"}}
    one, _ = train(
        tiny, tiny_folder, tmp_path / "one", MemoryTracker(), algorithm, num_steps=1, **skip
    )
    tracker = MemoryTracker()
    two, result = train(
        tiny,
        tiny_folder,
        tmp_path / "two",
        tracker,
        algorithm,
        bad_slots=(1,),
        num_steps=2,
        trace={"num_groups": 0},
        **skip,
    )
    # The learning rate is constant after a warm-up of one step, so both took the same first step.
    assert equal(two, one)
    assert result is not None
    _, tokenizer = tiny
    ids = {tuple(prompt.prompt_ids): prompt.record["id"] for prompt in prompts(tokenizer)}
    (found,) = result.interventions
    assert (found["step"], found["action"], found["value"]) == (2, "skip", "nan")
    assert sorted(found["records"]) == sorted(ids[tuple(p)] for p in batch(tokenizer, 1))
    lines = dict(tracker.lines)
    assert [lines[step]["stability/num_skipped"] for step in (1, 2)] == [0.0, 1.0]
    assert "grad_norm" not in lines[2]
    assert "reward/mean" in lines[2]


def test_only_the_mini_batch_that_fails_is_left_out(
    tiny: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = tiny
    bad = prompts(tokenizer)[0].prompt_ids

    def spoil(credit: Callable[[Experience, int], Credit], _bad: Any) -> Any:
        def assign(experience: Experience, step: int) -> Credit:
            found = credit(experience, step)
            rows = torch.tensor([r.prompt_ids == bad for r in experience.rollouts])
            spoiled = torch.where(rows[:, None], math.nan, found.advantages)
            return dataclasses.replace(found, advantages=spoiled)

        return assign

    monkeypatch.setattr("tests.stages.test_online_policies.poisoned", spoil)
    tracker = MemoryTracker()
    _, result = train(
        tiny,
        tiny_folder,
        tmp_path,
        tracker,
        "rloo",
        num_steps=2,
        num_mini_batches=3,
        stability={"non_finite": "skip", "max_interventions": 8},
    )
    assert result is not None
    # Of the three mini-batches of a step, those are left out that hold a rollout of the prompt.
    assert bad in batch(tokenizer, 0) + batch(tokenizer, 1)
    assert all("1+2=" in one["records"] for one in result.interventions)
    assert 1 <= len(result.interventions) <= 6
    assert result.metrics["stability/num_skipped"] == len(result.interventions)
    assert all(math.isfinite(value) for _, line in tracker.lines for value in line.values())


def test_a_rewind_goes_on_with_other_prompts_and_a_smaller_step(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {"stability": {"non_finite": "rewind", "rewind_learning_rate_factor": 0.25}}
    tracker = MemoryTracker()
    # Place 3 fails as the fourth step: back to the checkpoint of step 2.
    found, result = train(
        tiny, tiny_folder, tmp_path / "rewound", tracker, "rloo", bad_slots=(3,), **settings
    )
    assert result is not None
    assert [one["step"] for one in result.interventions] == [4]
    assert tracker.rewound == [0, 2]
    assert [step for step, _ in tracker.lines] == [1, 2, 3, 4]
    assert [line["learning_rate"] for _, line in tracker.lines] == [1e-3, 1e-3, 2.5e-4, 2.5e-4]
    # The same by hand: two plain steps, then prompts from place 4 on and a quarter of the rate.
    other = tmp_path / "by hand"
    train(tiny, tiny_folder, other, Mortal(3), "rloo", **settings)
    folder = other / "checkpoints" / "step-00000002"
    state = json.loads((folder / "state.json").read_text())
    assert state["extra"]["position"] == 6
    state["extra"]["position"] = 12
    state["extra"]["stability"]["learning_rate_scale"] = 0.25
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = file_digest(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    expected, _ = train(tiny, tiny_folder, other, MemoryTracker(), "rloo", **settings)
    assert equal(found, expected)


@EVERY_ALGORITHM
@pytest.mark.parametrize("action", ["skip", "rewind"])
@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_to_the_bit_at_every_point(
    tiny: Any, tiny_folder: Path, tmp_path: Path, algorithm: str, action: str
) -> None:
    settings: dict[str, Any] = {"bad_slots": (3,), "stability": {"non_finite": action}}
    whole = MemoryTracker()
    expected, complete = train(tiny, tiny_folder, tmp_path / "whole", whole, algorithm, **settings)
    assert complete is not None
    assert len(complete.interventions) == 1
    traces = traces_of(tmp_path / "whole")
    traced = str([table.to_pylist() for table in traces.values()])
    for reports in range(1, 10):
        run_dir = tmp_path / f"cut-{reports}"
        tracker = Mortal(reports)
        _, cut = train(tiny, tiny_folder, run_dir, tracker, algorithm, **settings)
        if cut is not None:
            break
        tracker.left = None
        weights, result = train(tiny, tiny_folder, run_dir, tracker, algorithm, **settings)
        assert result is not None
        assert equal(weights, expected), reports
        assert tracker.lines == whole.lines
        assert result.interventions == complete.interventions
        found = traces_of(run_dir)
        assert found.keys() == traces.keys()
        # As text, for the credit of the poisoned batch is not equal to itself.
        assert str([t.to_pylist() for t in found.values()]) == traced
    # Four reports with a skip; with a rewind, the third step is reported twice.
    assert reports == (5 if action == "skip" else 6)


@pytest.mark.slow
def test_asked_to_leave_and_resumed_equals_uninterrupted_to_the_bit(
    tiny: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"bad_slots": (3,), "stability": {"non_finite": "rewind"}}
    expected, _ = train(tiny, tiny_folder, tmp_path / "whole", MemoryTracker(), "ppo", **settings)
    monkeypatch.setattr(termination, "requested", lambda: True)
    result = None
    for _ in range(10):
        try:
            weights, result = train(
                tiny, tiny_folder, tmp_path / "cut", MemoryTracker(), "ppo", **settings
            )
        except termination.Terminated:
            continue
        break
    assert result is not None
    assert equal(weights, expected)


@pytest.mark.parametrize(
    ("changes", "case"),
    [
        ({"max_kl": 1e-6, "stability": {"kl": "rewind"}}, "kl"),
        ({"min_entropy": 100.0, "stability": {"entropy": "rewind"}}, "entropy"),
    ],
)
def test_what_does_not_help_is_done_a_few_times_only(
    tiny: Any,
    tiny_folder: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    case: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = MemoryTracker()
    with pytest.raises(UserError, match=r"3 times before, .*max_interventions allows no more"):
        train(tiny, tiny_folder, tmp_path, tracker, "rloo", **changes)
    taken_back = [message for message in caplog.messages if ": back to step " in message]
    assert len(taken_back) == 3
    assert "multiplied by 0.125 (intervention 3 of at most 3)" in taken_back[-1]
    state = sorted((tmp_path / "checkpoints").glob("step-*/state.json"))[-1]
    kept = json.loads(state.read_text())["extra"]["stability"]["interventions"]
    assert [one["case"] for one in kept] == [case] * 3


def test_a_kl_beyond_its_limit_is_mended_by_a_smaller_step(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    plain = MemoryTracker()
    train(tiny, tiny_folder, tmp_path / "plain", plain, "rloo")
    kl = [line["kl/mean"] for _, line in plain.lines]
    limit = (max(kl[:3]) + kl[3]) / 2
    assert kl[3] > limit
    tracker = MemoryTracker()
    _, result = train(
        tiny,
        tiny_folder,
        tmp_path / "limited",
        tracker,
        "rloo",
        max_kl=limit,
        stability={"kl": "rewind", "rewind_learning_rate_factor": 1e-6},
    )
    assert result is not None
    first = result.interventions[0]
    assert (first["step"], first["case"], first["limit"]) == (4, "kl", limit)
    assert first["value"] == kl[3]
    # The fourth step began with the weights of step 3, so they are those of step 2 again; on other
    # prompts these are found too far away as well, and then so are not those of the start.
    assert tracker.rewound == [0, 2, 0]
    assert [one["step"] for one in result.interventions] == [4, 3]
    assert [step for step, _ in tracker.lines] == [1, 2, 3, 4]
    assert all(line["kl/mean"] <= limit for _, line in tracker.lines)


def held_out_settings(**changes: Any) -> dict[str, Any]:
    probe = {"num_prompts": 2, "every": 1, "patience": 2, "min_drop": 0.1, **changes}
    return {"num_steps": 5, "checkpoint_every": 4, "stability": {"held_out": probe}}


def test_a_reward_that_rises_while_held_out_accuracy_falls_stops_the_stage(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    _, tokenizer = tiny
    accuracy = {0: 0.5, 1: 1.0, 2: 0.5, 3: 0.5, 4: 0.5}
    probe = prompts(tokenizer)[:2]
    tracker = MemoryTracker()

    def run(run_dir: Path, risen: int, accuracy: dict[int, float]) -> None:
        train(
            tiny,
            tiny_folder,
            run_dir,
            tracker,
            "rloo",
            script=lambda inner: Scripted(inner, tokenizer, accuracy, risen),
            held_out=probe,
            **held_out_settings(),
        )

    with pytest.raises(
        UserError,
        match=r"^step 4: held-out accuracy was below 1.000 \(after step 1\) by more than 0.1 in "
        r"the last 2 checks, and is 0.500, while the training reward rose from .*: the reward is "
        "being exploited",
    ):
        run(tmp_path / "hacked", 9, accuracy)
    assert [line["held_out/accuracy"] for _, line in tracker.lines] == [0.5, 1.0, 0.5]
    # A reward that falls as well is no hacking, and neither is an accuracy that comes back.
    run(tmp_path / "worse", 2, accuracy)
    run(tmp_path / "back", 9, {**accuracy, 3: 1.0})


@pytest.mark.slow
def test_a_rewind_to_the_best_accuracy_is_resumed_to_the_bit(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    _, tokenizer = tiny
    accuracy = {0: 0.5, 1: 1.0, 2: 0.5, 3: 0.5, 4: 0.5}

    def run(run_dir: Path, tracker: MemoryTracker) -> tuple[Weights, online.OnlineResult | None]:
        # The reward rises on the first four batches only: after the rewind, nothing is wrong.
        return train(
            tiny,
            tiny_folder,
            run_dir,
            tracker,
            "ppo",
            script=lambda inner: Scripted(inner, tokenizer, accuracy, 4),
            held_out=prompts(tokenizer)[:2],
            **held_out_settings(action="rewind"),
        )

    whole = MemoryTracker()
    expected, complete = run(tmp_path / "whole", whole)
    assert complete is not None
    (found,) = complete.interventions
    assert (found["step"], found["case"], found["value"]) == (4, "held_out", 0.5)
    assert whole.rewound == [0, 1]
    assert [check["step"] for check in complete.checks] == [0, 1, 2, 3, 4]
    for reports in range(1, 12):
        tracker = Mortal(reports)
        _, cut = run(tmp_path / f"cut-{reports}", tracker)
        if cut is not None:
            break
        tracker.left = None
        weights, result = run(tmp_path / f"cut-{reports}", tracker)
        assert result is not None
        assert equal(weights, expected), reports
        assert tracker.lines == whole.lines
        assert result.checks == complete.checks
        assert result.interventions == complete.interventions
    assert reports == 8  # three steps, back to the first, four more


class Judge:
    """An engine and a rewarder in one: the accuracy of each check is scripted."""

    def __init__(self, accuracies: Sequence[float]) -> None:
        self.accuracies = list(accuracies)
        self.calls: list[tuple[int, float, int, int]] = []

    def generate(self, prompt_ids: Any, sampling: Any, *, num_samples: int, seed: int) -> Any:
        self.calls.append((len(prompt_ids), sampling.temperature, num_samples, seed))
        return [None] * len(prompt_ids)

    def verify(self, rollouts: Any, records: Any) -> Tensor:
        share = self.accuracies.pop(0)
        return torch.tensor([1.0 if i < share * len(records) else 0.7 for i in range(len(records))])


def checked(accuracies: Sequence[float], rewards: Sequence[float]) -> HeldOutProbe:
    judge: Any = Judge(accuracies)
    config = rl_config("rloo", **held_out_settings(every=5)).online
    assert config is not None
    records = [PromptRecord({"id": str(n)}, [n]) for n in range(10)]
    probe = HeldOutProbe(judge, judge, records, config)
    for number, reward in enumerate(rewards):
        step = 5 * number
        assert probe.due(step) and not probe.due(step + 1)
        probe.look(step)
        assert not probe.due(step)
        probe.check(step + 1, 99.0)  # another step's reward
        probe.check(step, reward)
    # Greedily, once, and always alike.
    assert judge.calls == [(10, 0.0, 1, 0)] * len(rewards)
    return probe


def test_every_check_of_the_window_must_show_it() -> None:
    # Best .8; 0.1 below it is .7, which does not count as fallen: only what is below does.
    probe = checked([0.5, 0.8, 0.6, 0.7, 0.6], [0, 1, 2, 3, 4])
    assert probe.best["step"] == 5
    assert [check["accuracy"] for check in probe.checks] == pytest.approx([0.5, 0.8, 0.6, 0.7, 0.6])
    with pytest.raises(Unstable, match=r"below 0.800 \(after step 5\).*from 1.000 to 2.500"):
        checked([0.5, 0.8, 0.6, 0.6], [0, 1, 2, 3])
    # The mean reward of the window, 1, is not above the one at the best check.
    checked([0.5, 0.8, 0.6, 0.6], [0, 1, 2, 0])


def test_the_newest_of_equally_good_checks_is_the_best() -> None:
    assert checked([0.5, 0.5], [0, 0]).best["step"] == 5


def records_of(texts: Sequence[str]) -> list[PromptRecord]:
    return [PromptRecord({"id": str(n), "prompt": t}, [n]) for n, t in enumerate(texts)]


def test_held_out_prompts_are_never_trained_on() -> None:
    own = records_of(["1+1=", "2+2=", "3+3=", " 1+1= ", "4+4=", "2+2="])
    config = rl_config("rloo", **held_out_settings(num_prompts=2)).online
    assert config is not None
    rest, probe = split_held_out(own, config.stability.held_out)
    asked = {one.record["prompt"].strip() for one in probe}
    trained = {one.record["prompt"].strip() for one in rest}
    assert (len(probe), len(asked)) == (2, 2)
    assert asked | trained == {"1+1=", "2+2=", "3+3=", "4+4="}
    assert not asked & trained
    # The order of the records, and further records, do not change what is held out much.
    again, same = split_held_out(own[::-1], config.stability.held_out)
    assert {one.record["prompt"].strip() for one in same} == asked
    assert len(again) == len(rest)
    assert split_held_out(own, None) == (own, [])
    with pytest.raises(UserError, match=r"num_prompts is 2, but data.prompts has 2 distinct"):
        split_held_out(records_of(["1", "2", "1"]), config.stability.held_out)


def test_a_resumed_stage_says_where(
    tiny: Any, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(tiny, tiny_folder, tmp_path, Mortal(3), "rloo")
    train(tiny, tiny_folder, tmp_path, MemoryTracker(), "rloo")
    assert "resuming at step 2 of 4: epoch 2, prompt 1 of 5 in the data order" in caplog.messages
    train(tiny, tiny_folder, tmp_path, MemoryTracker(), "rloo")
    assert (
        "nothing left to train: all 4 steps were done before; writing the artifact"
        in caplog.messages
    )

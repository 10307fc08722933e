"""Skips and rewinds in the offline loop: against a loop written by hand, and to the bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from schemas.base import UserError
from schemas.training import SFTConfig
from stages import supervised, termination
from stages.models import load_base
from stages.optimization import learning_rate
from stages.ordering import records_at
from stages.supervised import MicroLoss
from stages.train_sft import micro_losses
from tests.stages.conftest import tiny_config
from tests.stages.fakes import Killed, MemoryTracker
from tests.stages.test_supervised import CONFIG, examples, same

SEED, NUM_STEPS = 5, 8
IDS = [f"r{index}" for index in range(16)]

Poison = Callable[[PreTrainedModel, MicroLoss], MicroLoss]


def not_a_number(_model: PreTrainedModel, micro: MicroLoss) -> MicroLoss:
    return MicroLoss(micro.loss * float("nan"), micro.metrics)


def without_a_gradient(model: PreTrainedModel, micro: MicroLoss) -> MicroLoss:
    """The loss stays as it is; its gradient is 0 times infinity."""
    weight = next(iter(model.parameters()))
    return MicroLoss(micro.loss + (0 * weight).abs().sum().sqrt(), micro.metrics)


def slot(number: int) -> list[int]:
    """The records of the batch at a place in the data order."""
    return records_at(4 * number, 4, 16, SEED)


def settings(**stability: Any) -> SFTConfig:
    return SFTConfig.model_validate({**CONFIG.model_dump(), "stability": stability})


def train(
    run_dir: Path,
    tracker: MemoryTracker,
    config: SFTConfig,
    bad_slots: tuple[int, ...] = (),
    poison: Poison = not_a_number,
    die_at: int | None = None,
) -> tuple[PreTrainedModel, supervised.TrainingResult | None]:
    """Train with a loss that is poisoned on some batches; die_at is a call of the loss, from 1."""
    model, _ = load_base(tiny_config(), seed=0)
    data = examples()
    bad = [slot(number) for number in bad_slots]
    calls = 0

    def losses(indices: list[int], max_tokens: int) -> Iterator[MicroLoss]:
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise Killed
        for micro in micro_losses(model, [data[i] for i in indices], config, max_tokens):
            yield poison(model, micro) if indices in bad else micro

    try:
        result = supervised.train(
            model,
            section="sft",
            record_ids=IDS,
            micro_losses=losses,
            settings=config,
            seed=SEED,
            run_dir=run_dir,
            tracker=tracker,
        )
    except Killed:
        return model, None
    return model, result


def by_hand(schedule: list[tuple[int, int, float]]) -> PreTrainedModel:
    """A plain loop over (step, place in the data order, factor of the learning rate)."""
    model, _ = load_base(tiny_config(), seed=0)
    model.train()
    data = examples()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2]},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step, place, factor in schedule:
        chosen = [data[i] for i in slot(place)]
        for micro in micro_losses(model, chosen, CONFIG, CONFIG.micro_batch_tokens):
            micro.loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in adamw.param_groups:
            group["lr"] = factor * learning_rate(CONFIG.optimizer, step, NUM_STEPS)
        adamw.step()
        adamw.zero_grad()
    return model


SKIP, REWIND = settings(non_finite="skip"), settings(non_finite="rewind")
# Checkpoints are those of steps 3 and 6. The batch at place 4 fails as the fifth step: its step is
# left out, or training goes back to step 3 and leaves out the batches at places 3 and 4.
SKIPPED = [(step, step, 1.0) for step in range(NUM_STEPS) if step != 4]
REWOUND = [(step, step, 1.0) for step in range(3)] + [(step, step + 2, 0.5) for step in range(3, 8)]


@pytest.mark.parametrize("poison", [not_a_number, without_a_gradient])
@pytest.mark.parametrize(
    ("config", "schedule", "counts"),
    [
        (SKIP, SKIPPED, {"stability/num_skipped": 1.0, "stability/num_rewinds": 0.0}),
        (REWIND, REWOUND, {"stability/num_skipped": 0.0, "stability/num_rewinds": 1.0}),
    ],
)
def test_the_weights_are_those_of_the_steps_that_stand(
    tmp_path: Path,
    poison: Poison,
    config: SFTConfig,
    schedule: list[tuple[int, int, float]],
    counts: dict[str, float],
) -> None:
    tracker = MemoryTracker()
    model, result = train(tmp_path, tracker, config, (4,), poison)
    assert same(model, by_hand(schedule))
    assert result is not None
    assert result.counts == counts
    assert {k: dict(tracker.lines)[8][k] for k in counts} == counts
    (intervention,) = result.interventions
    assert intervention["step"] == 5
    assert intervention["records"] == [IDS[index] for index in slot(4)]
    # One line a step, those that were taken back replaced.
    assert [step for step, _ in tracker.lines] == list(range(1, 9))


def test_a_rewind_before_the_first_checkpoint_goes_to_the_start(tmp_path: Path) -> None:
    model, result = train(tmp_path, MemoryTracker(), REWIND, (1,))
    assert same(model, by_hand([(step, step + 2, 0.5) for step in range(NUM_STEPS)]))
    assert result is not None
    assert len(result.interventions) == 1


def test_a_second_rewind_cuts_again_and_leaves_out_more(tmp_path: Path) -> None:
    # Place 4 fails as step 5, back to 3; place 6 fails as step 5 again, back to 3 once more.
    model, result = train(tmp_path, MemoryTracker(), REWIND, (4, 6))
    steps = [(step, step, 1.0) for step in range(3)]
    assert same(model, by_hand(steps + [(step, step + 4, 0.25) for step in range(3, 8)]))
    assert result is not None
    assert [one["step"] for one in result.interventions] == [5, 5]
    assert [one["learning_rate_scale"] for one in result.interventions] == [0.5, 0.25]


@pytest.mark.parametrize("config", [SKIP, REWIND], ids=["skip", "rewind"])
@pytest.mark.parametrize(
    "bad_slots",
    [
        (4,),
        pytest.param((4, 6), marks=pytest.mark.slow),
        pytest.param((0, 7), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_killed_and_resumed_equals_uninterrupted_to_the_bit_at_every_point(
    tmp_path: Path, config: SFTConfig, bad_slots: tuple[int, ...]
) -> None:
    whole = MemoryTracker()
    expected, complete = train(tmp_path / "whole", whole, config, bad_slots)
    assert complete is not None
    for die_at in range(1, 13):
        tracker = MemoryTracker()
        _, cut = train(tmp_path / f"cut-{die_at}", tracker, config, bad_slots, die_at=die_at)
        if cut is not None:  # it never came to that call
            break
        model, result = train(tmp_path / f"cut-{die_at}", tracker, config, bad_slots)
        assert result is not None
        assert same(model, expected), die_at
        assert tracker.lines == whole.lines
        assert result.metrics == complete.metrics
        assert result.interventions == complete.interventions
    assert die_at > NUM_STEPS


@pytest.mark.parametrize("config", [SKIP, REWIND], ids=["skip", "rewind"])
def test_asked_to_leave_and_resumed_equals_uninterrupted_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: SFTConfig
) -> None:
    bad_slots = (4, 6)
    expected, complete = train(tmp_path / "whole", MemoryTracker(), config, bad_slots)
    assert complete is not None
    # Asked after every single step: its checkpoints are none that training goes back to.
    monkeypatch.setattr(termination, "requested", lambda: True)
    tracker = MemoryTracker()
    for _ in range(20):
        try:
            model, result = train(tmp_path / "cut", tracker, config, bad_slots)
        except termination.Terminated:
            continue
        break
    assert result is not None
    assert same(model, expected)
    assert result.interventions == complete.interventions
    assert [step for step, _ in tracker.lines] == list(range(1, 9))


def test_a_damaged_checkpoint_is_passed_over_in_a_rewind(tmp_path: Path) -> None:
    config = settings(non_finite="rewind")
    tracker = MemoryTracker()
    train(tmp_path, tracker, config, (7,), die_at=8)
    newest = tmp_path / "checkpoints" / "step-00000006" / "model.safetensors"
    # The stage resumes at step 6; then the file goes bad, and step 8 fails.
    model, _ = load_base(tiny_config(), seed=0)

    def damaging(_model: PreTrainedModel, micro: MicroLoss) -> MicroLoss:
        newest.write_bytes(newest.read_bytes()[:-1] + b"\x00")
        return not_a_number(_model, micro)

    model, result = train(tmp_path, tracker, config, (7,), damaging)
    assert result is not None
    steps = [(step, step, 1.0) for step in range(3)]
    assert same(model, by_hand(steps + [(step, step + 5, 0.5) for step in range(3, 8)]))


def test_stop_is_the_default_and_comes_before_any_gradient(tmp_path: Path) -> None:
    model, _ = load_base(tiny_config(), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = examples()

    def losses(indices: list[int], max_tokens: int) -> Iterator[MicroLoss]:
        for micro in micro_losses(model, [data[i] for i in indices], CONFIG, max_tokens):
            yield not_a_number(model, micro)
            # Not come to: the first micro-batch has ended the step.
            raise AssertionError

    with pytest.raises(
        UserError, match=r"^step 1: the loss is nan \(records r\d+, r\d+, r\d+, r\d+\): look at"
    ):
        supervised.train(
            model,
            section="sft",
            record_ids=IDS,
            micro_losses=losses,
            settings=CONFIG,
            seed=SEED,
            run_dir=tmp_path,
            tracker=MemoryTracker(),
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not (tmp_path / "checkpoints").exists()


def test_too_many_interventions_stop_the_stage(tmp_path: Path) -> None:
    config = settings(non_finite="rewind", max_interventions=1)
    with pytest.raises(UserError, match=r"^step 5: the loss is nan .*; 1 times before"):
        train(tmp_path, MemoryTracker(), config, (4, 6))


def test_a_stage_that_skips_every_step_has_learned_nothing(tmp_path: Path) -> None:
    config = settings(non_finite="skip", max_interventions=8)
    with pytest.raises(UserError, match="each of the 8 steps of sft was left out"):
        train(tmp_path, MemoryTracker(), config, tuple(range(8)))


@pytest.mark.parametrize(
    ("limits", "schedule"),
    [
        ({"max": 100.0}, SKIPPED),
        ({"max_ratio": 50.0, "window": 3}, SKIPPED),
        ({"max": 100.0, "action": "rewind"}, REWOUND),
    ],
)
def test_an_exploding_gradient_is_left_out(
    tmp_path: Path, limits: dict[str, Any], schedule: list[tuple[int, int, float]]
) -> None:
    def explode(_model: PreTrainedModel, micro: MicroLoss) -> MicroLoss:
        return MicroLoss(micro.loss * 1000, micro.metrics)

    config = settings(grad_norm=limits)
    tracker = MemoryTracker()
    model, result = train(tmp_path, tracker, config, (4,), explode)
    assert result is not None
    (found,) = result.interventions
    assert (found["step"], found["case"]) == (5, "grad_norm")
    assert found["value"] > 100
    # Without the policy, clipping makes a step of it.
    clipped, _ = train(tmp_path / "clipped", MemoryTracker(), CONFIG, (4,), explode)
    assert same(model, by_hand(schedule))
    assert not same(clipped, model)


class Ruin:
    """A learning rate beyond single precision: the first step makes every weight infinite."""

    @staticmethod
    def config(**stability: Any) -> SFTConfig:
        return SFTConfig.model_validate(
            {
                **CONFIG.model_dump(),
                "optimizer": {"learning_rate": 1e39, "schedule": "constant", "warmup_fraction": 0},
                "checkpoint_every": 1,
                "stability": stability,
            }
        )


def test_ruined_weights_are_never_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^step 1: weight model\.\S+ is not finite any more"):
        train(tmp_path, MemoryTracker(), Ruin.config())
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(UserError, match="weights that are ruined cannot be skipped"):
        train(tmp_path, MemoryTracker(), Ruin.config(non_finite="skip"))
    # Nor are they when the stage is asked to leave.
    monkeypatch.setattr(termination, "requested", lambda: True)
    late = Ruin.config().model_copy(update={"checkpoint_every": 100})
    with pytest.raises(termination.Terminated):
        train(tmp_path, MemoryTracker(), late)
    assert not (tmp_path / "checkpoints").exists()


def test_ruined_weights_are_mended_by_a_rewind(tmp_path: Path) -> None:
    config = Ruin.config(non_finite="rewind", rewind_learning_rate_factor=1e-42)
    model, result = train(tmp_path, MemoryTracker(), config)
    assert result is not None
    assert [one["step"] for one in result.interventions] == [1]
    assert all(bool(torch.isfinite(value).all()) for value in model.parameters())


def test_a_resumed_stage_says_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train(tmp_path, MemoryTracker(), CONFIG, die_at=8)
    train(tmp_path, MemoryTracker(), CONFIG, die_at=1)
    assert "resuming at step 6 of 8: epoch 2, record 8 of 16 in the data order" in caplog.messages
    caplog.clear()
    train(tmp_path, MemoryTracker(), CONFIG)
    train(tmp_path, MemoryTracker(), CONFIG)
    assert (
        "nothing left to train: all 8 steps were done before; writing the artifact"
        in caplog.messages
    )


def test_a_checkpoint_says_which_code_wrote_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, MemoryTracker(), CONFIG, die_at=5)
    state = json.loads((tmp_path / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert len(state["code"]["stages.supervised"]) == 64
    train(tmp_path, MemoryTracker(), CONFIG, die_at=1)
    assert "other code" not in caplog.text
    monkeypatch.setattr("stages.checkpoint.changed_code", lambda code: ["stages/packing.py"])
    train(tmp_path, MemoryTracker(), CONFIG, die_at=1)
    assert "written by other code: since then, stages/packing.py changed" in caplog.text


def test_without_records_no_stage_pretends_to_train(tmp_path: Path) -> None:
    model, _ = load_base(tiny_config(), seed=0)
    with pytest.raises(UserError, match="sft has no record to learn from and would run zero steps"):
        supervised.train(
            model,
            section="sft",
            record_ids=[],
            micro_losses=lambda indices: [],
            settings=CONFIG,
            seed=0,
            run_dir=tmp_path,
            tracker=MemoryTracker(),
        )

"""The offline loop: resume to the bit, micro-batch invariance, data order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from schemas.base import UserError
from schemas.training import OptimizerConfig, SFTConfig
from stages import supervised, termination
from stages.models import load_base
from stages.ordering import records_at
from stages.train_sft import Example, micro_losses
from tests.stages.conftest import tiny_config
from tests.stages.fakes import Killed, MemoryTracker

CONFIG = SFTConfig(
    optimizer=OptimizerConfig(learning_rate=1e-2),
    num_epochs=2,
    batch_size=4,
    max_length=32,
    micro_batch_tokens=64,
    checkpoint_every=3,
    log_every=1,
)


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(16):
        length = int(torch.randint(6, 20, (1,), generator=generator))
        ids = torch.randint(3, 17, (length,), generator=generator).tolist()
        found.append(Example(ids, [i >= 3 for i in range(length)]))
    return found


def train(
    run_dir: Path, tracker: MemoryTracker, *, die_at: int | None = None, config: SFTConfig = CONFIG
) -> tuple[PreTrainedModel, supervised.TrainingResult | None]:
    model, _ = load_base(tiny_config(), seed=0)
    data = examples()
    calls = 0

    def losses(indices: list[int], max_tokens: int):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise Killed
        return micro_losses(model, [data[i] for i in indices], config, max_tokens)

    try:
        result = supervised.train(
            model,
            section="sft",
            record_ids=[f"r{index}" for index in range(len(data))],
            micro_losses=losses,
            settings=config,
            seed=5,
            run_dir=run_dir,
            tracker=tracker,
        )
    except Killed:
        return model, None
    return model, result


def same(left: PreTrainedModel, right: PreTrainedModel) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("die_at", [1, 4, 5, 7, 8])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, die_at: int) -> None:
    whole, resumed = MemoryTracker(), MemoryTracker()
    expected, _ = train(tmp_path / "whole", whole)
    train(tmp_path / "cut", resumed, die_at=die_at)
    model, result = train(tmp_path / "cut", resumed)
    assert result is not None
    # Checkpoints come every 3 steps; call n is step n - 1.
    last_checkpoint = (die_at - 1) // 3 * 3
    assert result.resumed_from_step == (last_checkpoint or None)
    assert resumed.resumed == ([last_checkpoint] if last_checkpoint else [])
    assert same(model, expected)
    # Metrics of a step that was never checkpointed are logged again, with the same numbers.
    assert dict(resumed.lines) == dict(whole.lines)


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = train(tmp_path / "whole", MemoryTracker())
    train(tmp_path / "cut", MemoryTracker(), die_at=8)
    newest = tmp_path / "cut" / "checkpoints" / "step-00000006" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    model, result = train(tmp_path / "cut", MemoryTracker())
    assert result is not None
    assert result.resumed_from_step == 3
    assert "model.safetensors does not match its digest" in caplog.text
    assert same(model, expected)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, MemoryTracker())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008"]


def test_sigterm_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "requested", lambda: True)
    with pytest.raises(termination.Terminated, match="after step 1 of 8"):
        train(tmp_path, MemoryTracker())
    monkeypatch.setattr(termination, "requested", lambda: False)
    model, result = train(tmp_path, MemoryTracker())
    assert result is not None
    assert result.resumed_from_step == 1
    expected, _ = train(tmp_path / "whole", MemoryTracker())
    assert same(model, expected)


def test_micro_batches_do_not_change_the_gradient() -> None:
    gradients, losses = [], []
    for tokens in (20, 1000):
        model, _ = load_base(tiny_config(), seed=0)
        config = CONFIG.model_copy(update={"micro_batch_tokens": tokens})
        micro = list(micro_losses(model, examples()[:8], config, tokens))
        assert (len(micro) > 1) == (tokens == 20)
        for one in micro:
            one.loss.backward()  # type: ignore[no-untyped-call]
        losses.append(sum(one.loss.item() for one in micro))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_every_record_once_an_epoch() -> None:
    assert sorted(records_at(0, 10, 10, seed=1)) == list(range(10))
    assert sorted(records_at(10, 10, 10, seed=1)) == list(range(10))
    assert records_at(0, 10, 10, seed=1) != records_at(10, 10, 10, seed=1)
    # A batch that crosses the epoch is the end of one order and the start of the next.
    assert records_at(8, 4, 10, seed=1) == (
        records_at(0, 10, 10, seed=1)[8:] + records_at(10, 10, 10, seed=1)[:2]
    )


def test_too_many_cut_records_stop_the_stage() -> None:
    with pytest.raises(UserError, match=r"3 of 10 pairs \(30.0%\) are longer than max_length 8"):
        supervised.refuse_truncation("pairs", 3, 10, 0.2, 8)
    supervised.refuse_truncation("pairs", 3, 10, 0.3, 8)

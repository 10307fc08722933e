"""SIGTERM: a checkpoint, a clean exit within 30 s, and the same bits afterwards."""

from __future__ import annotations

import json
import random
import signal

import pytest

from stages.termination import EXIT_CODE
from tests.faults.conftest import Play, Row, sampled
from tests.faults.house import OTHERS, TRAINING
from tests.faults.inject import Fault
from tests.faults.trials import Trial

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("case", sampled(TRAINING, "train_rl:grpo"))
def test_in_a_step(play: Play, case: str) -> None:
    """The step is finished and kept, whatever `checkpoint_every` says."""

    def row(step: int) -> Row:
        def body(trial: Trial) -> None:
            ended = trial.attempt(Fault("term", "write", r"/metrics\.jsonl$", nth=step))
            assert trial.struck()
            assert ended.code == EXIT_CODE
            assert ended.seconds < 30
            assert trial.newest_step() == step
            result = json.loads((trial.work / "result.json").read_bytes())
            assert result["status"] == "terminated" and result["retryable"]
            assert f"after step {step} of" in result["message"]
            trial.compare()

        return Row("SIGTERM", "in a step", f"step {step}", body)

    play(case, [row(step) for step in (1, 5)])


@pytest.mark.parametrize("case", [*TRAINING, *OTHERS])
def test_at_random_times(play: Play, case: str) -> None:
    def row(seed: int) -> Row:
        def body(trial: Trial) -> None:
            share = random.Random(f"term {case} {seed}").uniform(0.0, 0.9)
            when = share * trial.reference.cpu
            ended = trial.attempt(after_cpu=when, signal=signal.SIGTERM)
            # Before its handler is there, and in a stage that has nothing to save, it just ends.
            assert ended.code in (EXIT_CODE, -signal.SIGTERM, 0), ended
            assert ended.seconds < 30
            trial.compare()

        return Row("SIGTERM", "random times", f"seed {seed}", body)

    play(case, [row(seed) for seed in range(2)])

"""A stage's process is killed, at the worst moments and at random ones, and goes on to the same."""

from __future__ import annotations

import random
import signal

import pytest

from tests.faults.conftest import Play, Row, sampled
from tests.faults.house import OTHERS, TRAINING
from tests.faults.inject import Fault
from tests.faults.moments import CHECKPOINT, PUBLISH
from tests.faults.trials import Trial

pytestmark = pytest.mark.faults

_ENDS = {"kill": -signal.SIGKILL, "cut": -signal.SIGXFSZ}
_NUM_SEEDS = 6
CASES = (*TRAINING, *OTHERS)


def killed_at(fault: Fault, moment: str) -> Row:
    def body(trial: Trial) -> None:
        ended = trial.attempt(fault)
        assert trial.struck(), f"this moment never came: {ended}"
        assert ended.code == _ENDS[fault.do], ended
        trial.compare()

    return Row("kill -9", moment, moment, body)


@pytest.mark.parametrize("case", sampled(CASES, "train_sft", "train_rl:grpo", "evaluate:grpo"))
def test_at_the_worst_moments(play: Play, case: str) -> None:
    moments = PUBLISH | (CHECKPOINT if case in TRAINING else {})
    play(case, [killed_at(fault, moment) for moment, fault in moments.items()])


@pytest.mark.parametrize("case", sampled(CASES, "train_rl:grpo"))
def test_at_random_operations_on_files(play: Play, case: str) -> None:
    """Up to three kills one after the other, each at any operation on a file of the store."""

    def row(seed: int) -> Row:
        def body(trial: Trial) -> None:
            draw = random.Random(f"{case} {seed}")
            for number in range(1 + seed % 3):
                nth = draw.randint(1, trial.reference.num_events)
                if trial.store.find(trial.request.fingerprint) is not None:
                    break
                ended = trial.attempt(Fault("kill", nth=nth))
                # What goes on from a checkpoint has fewer operations left.
                assert trial.struck() or (number and ended.code == 0), ended
            trial.compare()

        return Row("kill -9", "random operations on files", f"seed {seed}", body)

    play(case, [row(seed) for seed in range(_NUM_SEEDS)])


@pytest.mark.parametrize("case", sampled(CASES, "evaluate:grpo"))
def test_at_random_times(play: Play, case: str) -> None:
    """A kill from outside after a random share of the stage's processor time."""

    def row(seed: int) -> Row:
        def body(trial: Trial) -> None:
            share = random.Random(f"time {case} {seed}").uniform(0.0, 0.9)
            ended = trial.attempt(after_cpu=share * trial.reference.cpu)
            assert ended.code in (-signal.SIGKILL, 0), ended
            trial.compare()

        return Row("kill -9", "random times", f"seed {seed}", body)

    play(case, [row(seed) for seed in range(4 if case in TRAINING else 2)])

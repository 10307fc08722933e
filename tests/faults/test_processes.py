"""Real processes: `infra.launch.run_stage` starts `python -m stages.main`, which is killed."""

from __future__ import annotations

import random
import signal

import pytest

from stages.termination import EXIT_CODE
from tests.faults.conftest import Play, Row
from tests.faults.house import OTHERS, TRAINING
from tests.faults.inject import Fault
from tests.faults.moments import CHECKPOINT, PUBLISH
from tests.faults.trials import Trial

pytestmark = pytest.mark.faults

_ENDS = {"kill": -signal.SIGKILL, "cut": -signal.SIGXFSZ}
_START_CPU = 4.0
"""Processor seconds that a stage's process may take to start."""


@pytest.mark.parametrize("case", [*TRAINING, *OTHERS])
def test_a_process_of_its_own(play: Play, case: str) -> None:
    """A worst moment, drawn by lot, and a kill at any time, the imports' included."""
    draw = random.Random(f"process {case}")
    moments = PUBLISH | (CHECKPOINT if case in TRAINING else {})
    moment, fault = draw.choice(sorted(moments.items(), key=lambda item: item[0]))
    when = draw.uniform(0.2, _START_CPU)

    def at_the_worst_moment(trial: Trial) -> None:
        ended = trial.attempt(fault)
        assert trial.struck(), ended
        assert ended.code == _ENDS[fault.do]
        trial.compare()

    def at_any_time(trial: Trial) -> None:
        ended = trial.attempt(after_cpu=when)
        assert ended.code in (-signal.SIGKILL, 0)
        trial.compare()

    rows = [Row("kill -9", moment, moment, at_the_worst_moment, "process")]
    if case in TRAINING:
        rows.append(Row("kill -9", "random times", f"{when:.3f} CPU s", at_any_time, "process"))
    play(case, rows)


@pytest.mark.parametrize("case", ["train_sft", "train_rl:rloo"])
def test_sigterm(play: Play, case: str) -> None:
    def body(trial: Trial) -> None:
        ended = trial.attempt(Fault("term", "write", r"/metrics\.jsonl$", nth=4))
        assert trial.struck()
        assert ended.code == EXIT_CODE
        assert ended.seconds < 60  # with the imports on a busy machine
        assert trial.newest_step() == 4
        trial.compare()

    play(case, [Row("SIGTERM", "in a step", "step 4", body, "process")])

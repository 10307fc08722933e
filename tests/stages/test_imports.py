"""What is in a process of a stage, by asking one."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHECK = """
import gc, sys, weakref
from stages.imports import import_stage

class Cycle:
    def __init__(self):
        self.own = self

import_stage("train_rl", hide=True)
from transformers import LlamaForCausalLM
found = {name.partition(".")[0] for name in sys.modules}
assert not found & {"scipy", "sklearn"}, found & {"scipy", "sklearn"}

import scipy.stats
import sklearn.metrics
assert sklearn.metrics.accuracy_score([1, 0], [1, 1]) == 0.5

assert gc.isenabled() and gc.get_freeze_count() > 100_000
made = weakref.ref(Cycle())
gc.collect()
assert made() is None
"""


@pytest.mark.slow
def test_a_stage_imports_no_package_that_it_does_not_use_and_a_verifier_still_may() -> None:
    done = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""What is in a process of a stage, by asking one."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHECK = """
import sys
from stages.imports import hide_unused_packages

hide_unused_packages()
from transformers import LlamaForCausalLM
from stages import train_rl
found = {name.partition(".")[0] for name in sys.modules}
assert not found & {"scipy", "sklearn"}, found & {"scipy", "sklearn"}

import scipy.stats
import sklearn.metrics
assert sklearn.metrics.accuracy_score([1, 0], [1, 1]) == 0.5
"""


@pytest.mark.slow
def test_a_stage_imports_no_package_that_it_does_not_use_and_a_verifier_still_may() -> None:
    done = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

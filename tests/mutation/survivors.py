"""Judges the mutants that no test killed: each must be explained here, or this fails.

A mutant is explained where it cannot change a result. The rest wants a better test.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

EXPLAINED = {
    # (function, a part of the mutated line): why no test can tell it from the original
    ("place_step_rewards", "enumerate(zip(step_rewards, step_ends, "): (
        "strict: unequal counts were refused with a message before the loop"
    ),
    ("group_normalized", "std(correction=None)"): "torch's default correction is 1",
    ("token_rewards", "torch.where(valid, positions, -2)"): (
        "before the first valid token any negative number says so"
    ),
    ("explained_variance", "(kept == kept[1]).all()"): (
        "all equal to the second number is all equal to the first; there are two or more here"
    ),
    ("policy_ratio", "upcast(logprobs - old_logprobs), 1.0)"): (
        "what fills masked places is in no sum and is overwritten at the end; that something "
        "fills them keeps NaN out of the gradient, which is tested"
    ),
    ("clipped_policy_loss", "(advantages <= 0) & (loss > ceiling)"): (
        "at advantage 0 loss and ceiling are both 0, and 0 is not above 0"
    ),
}


def main() -> int:
    """Print what survived and why; 1 if a survivor is not explained."""
    statuses = dict(re.findall(r"^\s+(\S+): (.+)$", _mutmut("results", "--all", "true"), re.M))
    counts = Counter(statuses.values())
    print(", ".join(f"{number} {status}" for status, number in sorted(counts.items())))
    unexplained = 0
    for name, status in statuses.items():
        if status == "killed":
            continue
        function = name.split("x_", 1)[-1].split("__mutmut", 1)[0]
        added = [
            line[1:].strip() for line in _mutmut("show", name).splitlines()[3:] if line[:1] == "+"
        ]
        why = _why(function, added) if status == "survived" else None
        unexplained += why is None
        print(f"{status}: {function}: {' '.join(added)}\n    {why or 'NOT EXPLAINED'}")
    if not counts["killed"]:
        print("no mutant was killed: the run did not work")
        return 1
    return 1 if unexplained else 0


def _why(function: str, added: list[str]) -> str | None:
    for (where, part), why in EXPLAINED.items():
        if where == function and any(part in line for line in added):
            return why
    return None


def _mutmut(*arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())

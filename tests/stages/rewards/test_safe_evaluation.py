"""What a model wrote, or a record holds, is scored and never run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.rewards.safe_evaluation import evaluate

# Scores every item's own answer, under the restriction and without it.
OWN_ANSWERS = """
import json, sys
import reasoning_gym
from stages.rewards import safe_evaluation

names = json.loads(sys.argv[1])
def scores():
    out = {}
    for name in names:
        items = reasoning_gym.create_dataset(name, size=4, seed=1)
        out[name] = [items.score_answer(item["answer"], item) for item in items]
    return out
before = scores()
safe_evaluation.restrict()
print(json.dumps([before, scores()]))
"""

ATTACK = """
import json, sys
from stages.rewards.scoring_worker import make_scorer

name, completions, answer = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if not answer:
    import reasoning_gym
    item = reasoning_gym.create_dataset(name.partition(":")[2], size=1, seed=1)[0]
    answer = json.dumps(item, default=str)
arguments = {"max_characters": 8000} if name == "math_verify" else {}
score = make_scorer(name, arguments, 4.0)
for completion in completions:
    try:
        print(score(completion, answer))
    except Exception as error:
        print("refused", error)
"""


def python(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2]", [1, 2]),
        ("('a', -3.5, True, None)", ("a", -3.5, True, None)),
        ("{'a': {1, 2}}", {"a": {1, 2}}),
        (" (0xa + 0x5) << 2 ", 60),
        ("7 // 2 - 3 % 2 + 1 / 4", 2.25),
        ("~5 ^ 3 & 6 | 1", -7),
    ],
)
def test_literals_and_arithmetic_have_their_value(text: str, value: object) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "open('x', 'w')",
        "__import__('os')",
        "().__class__",
        "x",
        "[a for a in (1,)]",
        "lambda: 1",
        "f'{1}'",
        "{**{}}",
        "9 ** 9",
        "(y := 1)",
        "[1][0]",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither a literal nor arithmetic"):
        evaluate(text)


@pytest.mark.parametrize(
    "name",
    [
        "reasoning_gym:string_insertion",
        "reasoning_gym:n_queens",
        "reasoning_gym:countdown",
        "reasoning_gym:polynomial_multiplication",
        "reasoning_gym:simple_integration",
        "math_verify",
    ],
)
def test_a_completion_is_never_run(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    answer = "2" if name == "math_verify" else ""
    write = f"open({str(mark)!r},'w').write('x')"
    attacks = [
        f"[{write}]",
        f"__import__('os').system('touch {mark}')",
        f'sympify("{write}")',
        f'lambdify(x, Symbol("{write}"))(1)',
        f"eval({write!r})",
    ]
    completions = [*attacks, *(f"${attack}$" for attack in attacks)]
    lines = python(ATTACK, name, json.dumps(completions), answer).splitlines()
    assert len(lines) >= len(completions)
    assert not mark.exists()


def test_right_answers_keep_their_scores() -> None:
    names = [
        "string_insertion",
        "spiral_matrix",
        "number_sorting",
        "binary_matrix",
        "n_queens",
        "bitwise_arithmetic",
        "basic_arithmetic",
        "simple_integration",
        "intermediate_integration",
        "polynomial_multiplication",
        "countdown",
        "puzzle24",
        "simple_equations",
        "gsm_symbolic",
    ]
    before, after = json.loads(python(OWN_ANSWERS, json.dumps(names)).splitlines()[-1])
    assert before == after
    assert all(1.0 in scores for scores in after.values())

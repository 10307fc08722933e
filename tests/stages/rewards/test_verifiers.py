"""Verifiers on right answers, wrong answers, garbage, and texts that hang or kill."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import reasoning_gym

from schemas.base import UserError
from schemas.rewards import VerifierConfig
from stages.rewards import scoring_worker, verifiers
from stages.rewards.scorer_pool import ScorerPool
from stages.rewards.verifiers import Verifier, build_verifier


def children() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any("scoring_worker" in word for word in process.cmdline())
    ]


@pytest.fixture(scope="module")
def math_verifier() -> Verifier:
    verifier = build_verifier(VerifierConfig(function="math_verify"))
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("72", "72", 1.0),
        ("so she has 18 + 54 = 72 clips", "72", 1.0),
        ("the answer is $\\boxed{72}$.", "72", 1.0),
        ("71", "72", 0.0),
        ("$\\frac{2}{4}$", "\\frac{1}{2}", 1.0),
        ("0.5", "1/2", 1.0),
        ("", "72", 0.0),
        ("no idea", "72", 0.0),
        ("\\frac{{{", "72", 0.0),
        ("\x00\ud7ff <<>> \\begin{matrix}", "72", 0.0),
    ],
)
def test_math_verify(math_verifier: Verifier, completion: str, answer: str, score: float) -> None:
    assert math_verifier.score([completion], [answer]) == [score]


def test_math_verify_keeps_the_order_and_survives_texts_that_hang(math_verifier: Verifier) -> None:
    completions = ["72", "$9^{9^{9^{9}}}$", *[str(n) for n in range(60, 90)], "72"]
    start = time.monotonic()
    scores = math_verifier.score(completions, ["72"] * len(completions))
    assert scores == [1.0, 0.0] + [float(n == 72) for n in range(60, 90)] + [1.0]
    assert time.monotonic() - start < verifiers._SECONDS * 8


def test_math_verify_reads_the_end_of_a_long_text() -> None:
    config = VerifierConfig(function="math_verify", arguments={"max_characters": 20})
    verifier = build_verifier(config)
    try:
        padding = "word " * 100_000
        assert verifier.score([padding + "72", "72 " + padding], ["72", "72"]) == [1.0, 0.0]
    finally:
        verifier.close()


def test_math_verify_works_outside_the_main_thread(math_verifier: Verifier) -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(math_verifier.score(["7"], ["7"])))
    thread.start()
    thread.join()
    assert found == [1.0]
    # The processes outlive the thread that they were started from.
    assert math_verifier.score(["7"], ["7"]) == [1.0]


def test_math_verify_names_an_answer_that_is_no_mathematics(math_verifier: Verifier) -> None:
    with pytest.raises(UserError, match="no mathematics in the answer"):
        math_verifier.score(["7", "7"], ["7", "???"])
    assert math_verifier.score(["7"], ["7"]) == [1.0]


@pytest.mark.parametrize("arguments", [{"max_chars": 5}, {"max_characters": 0}])
def test_math_verify_refuses_unknown_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match="takes one argument, max_characters"):
        build_verifier(VerifierConfig(function="math_verify", arguments=arguments))


def test_a_killed_process_costs_nothing(math_verifier: Verifier) -> None:
    assert math_verifier.score(["1"] * 4, ["1"] * 4) == [1.0] * 4
    workers = children()
    assert workers
    for worker in workers:
        worker.kill()
    assert math_verifier.score(["1"] * 4, ["1"] * 4) == [1.0] * 4


def test_a_signal_to_the_group_does_not_change_scores(math_verifier: Verifier) -> None:
    assert math_verifier.score(["1"], ["1"]) == [1.0]
    workers = children()
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        worker.send_signal(signal.SIGINT)
    assert math_verifier.score(["1"], ["1"]) == [1.0]
    assert {w.pid for w in children()} == {w.pid for w in workers}


def test_close_leaves_no_process() -> None:
    pool = ScorerPool("math_verify", {"max_characters": 100}, seconds=4, num_workers=2)
    before = {worker.pid for worker in children()}
    pool.score([("1", "1")] * 2)
    assert {worker.pid for worker in children()} - before
    pool.close()
    pool.close()
    assert {worker.pid for worker in children()} <= before


def test_a_dead_parent_leaves_no_process() -> None:
    script = (
        "from stages.rewards.scorer_pool import ScorerPool\n"
        "import os, psutil, signal\n"
        "pool = ScorerPool('math_verify', {'max_characters': 100}, seconds=4, num_workers=1)\n"
        "pool.score([('1', '1')])\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout))


def test_reasoning_gym_from_the_answer_alone() -> None:
    item = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    verifier = build_verifier(VerifierConfig(function="reasoning_gym:chain_sum"))
    right = item["answer"]
    texts = [right, f"hm <answer> {right} </answer>", f"<answer>1</answer> {right}", f"--{right}"]
    try:
        assert verifier.score([*texts, ""], [right] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    finally:
        verifier.close()


def test_reasoning_gym_from_the_whole_item() -> None:
    item = reasoning_gym.create_dataset("countdown", size=1, seed=3)[0]
    verifier = build_verifier(VerifierConfig(function="reasoning_gym:countdown"))
    whole = json.dumps(item)
    try:
        assert verifier.score([item["answer"], "1 +", "x"], [whole] * 3) == [1.0, 0.0, 0.0]
        with pytest.raises(UserError, match="countdown cannot score from the answer alone"):
            verifier.score([item["answer"]], [item["answer"]])
    finally:
        verifier.close()


def test_unknown_reasoning_gym_data_set_is_named() -> None:
    verifier = build_verifier(VerifierConfig(function="reasoning_gym:chain_sums"))
    with pytest.raises(UserError, match="no data set 'chain_sums'; did you mean chain_sum"):
        verifier.score(["1"], ["1"])
    verifier.close()


def test_wrong_reasoning_gym_arguments_are_named() -> None:
    with pytest.raises(UserError, match=r"does not take the arguments.*min_term"):
        scoring_worker.make_scorer("reasoning_gym:chain_sum", {"min_term": 3}, 1.0)


def test_scorer_that_raises_on_a_completion_is_wrong_not_an_error(monkeypatch) -> None:
    dataset = reasoning_gym.create_dataset("chain_sum", size=1)

    def broken(answer: str, entry: dict) -> float:
        if answer == "boom":
            raise KeyError(answer)
        return 1.0

    monkeypatch.setattr(dataset, "score_answer", broken)
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda name: dataset)
    score = scoring_worker.make_scorer("reasoning_gym:chain_sum", {}, 1.0)
    assert score("1", "1") == 1.0
    with pytest.raises(KeyError):
        score("boom", "1")  # which the worker's loop turns into 0.0


@pytest.fixture
def user_module(tmp_path, monkeypatch) -> str:
    (tmp_path / "house_rules.py").write_text(
        "def check(completion, answer, bonus=0.0):\n"
        "    return (completion == answer) + bonus\n"
        "def broken(completion, answer):\n"
        "    return {}[completion]\n"
        "def give(completion, answer, result=None):\n"
        "    return float(result) if result in ('nan', 'inf') else result\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "house_rules", raising=False)
    return "house_rules"


def test_user_function(user_module: str) -> None:
    config = VerifierConfig(function=f"{user_module}:check", arguments={"bonus": 0.25})
    assert build_verifier(config).score(["a", "b"], ["a", "a"]) == [1.25, 0.25]


def test_exception_in_a_user_function_names_everything(user_module: str) -> None:
    verifier = build_verifier(VerifierConfig(function=f"{user_module}:broken"))
    with pytest.raises(
        UserError, match="house_rules:broken on completion 'c' and answer 'a' raised KeyError: 'c'"
    ):
        verifier.score(["c"], ["a"])


@pytest.mark.parametrize("result", ["nan", "inf", "1.0", None, [1]])
def test_result_that_is_no_finite_number_is_refused(user_module: str, result: object) -> None:
    config = VerifierConfig(function=f"{user_module}:give", arguments={"result": result})
    with pytest.raises(UserError, match=r"house_rules:give.*must give a finite number"):
        build_verifier(config).score(["c"], ["a"])


@pytest.mark.parametrize(("result", "score"), [(True, 1.0), (0, 0.0), (-2.5, -2.5)])
def test_numbers_and_booleans_are_scores(user_module: str, result: float, score: float) -> None:
    config = VerifierConfig(function=f"{user_module}:give", arguments={"result": result})
    assert build_verifier(config).score(["c"], ["a"]) == [score]
    assert math.isfinite(score)


def test_lengths_must_agree(user_module: str) -> None:
    verifier = build_verifier(VerifierConfig(function=f"{user_module}:check"))
    with pytest.raises(ValueError, match="shorter"):
        verifier.score(["a", "b"], ["a"])

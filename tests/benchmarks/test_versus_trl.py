"""The ratios of the comparison, on numbers worked out by hand; and that both sides do one work."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import import_utils

from tests.benchmarks import versus_trl
from tests.benchmarks.versus_trl import _parser, measurements, ratios, table, work_of


def line(who: str, round_: int, tokens: float, memory: int, work: int = 64) -> dict[str, Any]:
    found: dict[str, Any] = {
        "who": who,
        "algorithm": "sft",
        "round": round_,
        "training_tokens": work,
        "tokens_a_cpu_second": tokens,
        "tokens_a_second": tokens / 2 if who.startswith("posttrain") else tokens / 4,
        "peak_memory_bytes": memory,
    }
    return found | ({"num_trained_parameters": 10} if who.startswith("posttrain") else {})


def test_each_round_is_compared_with_itself_and_the_median_is_taken() -> None:
    # A slow second round for both does not count twice: 3, 2 and 2.5 times as fast.
    found = [
        *(line("posttrain", 0, 300.0, 360), line("TRL defaults", 0, 100.0, 560)),
        *(line("posttrain", 1, 100.0, 260), line("TRL defaults", 1, 50.0, 560)),
        *(line("posttrain", 2, 250.0, 360), line("TRL defaults", 2, 100.0, 660)),
    ]
    # Above 16 bytes for each of 10 parameters: 200/400, 100/400 and 200/500.
    expected = {
        "tokens_a_cpu_second": pytest.approx(2.5),
        "tokens_a_second": pytest.approx(5.0),
        "memory_above_state": pytest.approx(0.4),
    }
    assert ratios(found) == {"sft": {"posttrain : TRL defaults": expected}}
    row = table(ratios(found)).splitlines()[2]
    assert row == "| sft | posttrain : TRL defaults | 2.50 | 5.00 | 0.40 |"


def test_a_second_measurement_of_ours_has_rows_of_its_own() -> None:
    found = [
        *(line("posttrain", 0, 300.0, 360), line("posttrain, checkpointed", 0, 200.0, 260)),
        *(line("TRL defaults", 0, 100.0, 560), line("TRL fastest", 0, 150.0, 660)),
    ]
    rows = {name: one["tokens_a_cpu_second"] for name, one in ratios(found)["sft"].items()}
    assert rows == {
        "posttrain : TRL defaults": pytest.approx(3.0),
        "posttrain : TRL fastest": pytest.approx(2.0),
        "posttrain, checkpointed : TRL defaults": pytest.approx(2.0),
        "posttrain, checkpointed : TRL fastest": pytest.approx(200 / 150),
    }
    one = ratios(found)["sft"]["posttrain, checkpointed : TRL defaults"]
    assert one["memory_above_state"] == pytest.approx(100 / 400)


def test_two_that_did_not_do_the_same_work_are_not_compared() -> None:
    with pytest.raises(SystemExit, match="64 tokens here and 63 in TRL"):
        ratios([line("posttrain", 0, 1.0, 200), line("TRL defaults", 0, 1.0, 200, work=63)])


def test_ppo_does_what_the_other_does_and_offline_lengths_vary() -> None:
    args = _parser().parse_args(["--model", "m", "--offline-lengths", "8+16..32"])
    ppo = work_of(args, "ppo")
    assert ppo[ppo.index("--num-epochs") + 1] == "4" and "--reward-model" in ppo
    sft, grpo = work_of(args, "sft"), work_of(args, "grpo")
    assert "--reward-model" not in sft and "--num-epochs" not in grpo
    names = ("--prompts", "--prompt-tokens", "--min-completion-tokens", "--completion-tokens")
    assert [sft[sft.index(name) + 1] for name in names] == ["16", "8", "16", "32"]
    assert [grpo[grpo.index(name) + 1] for name in names] == ["8", "64", "64", "64"]
    assert grpo[grpo.index("--precision") + 1] == "bfloat16"
    plain = work_of(_parser().parse_args(["--model", "m", "--precision", "float32"]), "grpo")
    assert plain[plain.index("--precision") + 1] == "float32"


def test_both_environments_have_requirements() -> None:
    folder = Path(__file__).parents[1] / "parity"
    pins = {
        name: [one for one in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("requirements.txt", "requirements-ppo.txt")
    }
    # The same torch on both sides, and in the Makefile's first call to pip.
    assert all("torch==2.13.0" in lines for lines in pins.values())
    assert "trl==1.12.0" in pins["requirements-ppo.txt"]


def test_no_module_here_is_taken_for_a_package() -> None:
    """This folder comes first where `trl_step` runs, and transformers looks for what it can use."""
    source = inspect.getsource(import_utils)
    packages = set(re.findall(r'_is_package_available\("(\w+)"', source))
    assert {"kernels", "accelerate"} <= packages
    assert not packages & {path.stem for path in Path(__file__).parent.glob("*.py")}


def test_trl_gets_settings_of_the_allocator_only_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, set[str]]] = []

    def run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
        calls.append((command[-1], set(environment)))
        return {}

    monkeypatch.setattr(versus_trl, "_run", run)
    args = _parser().parse_args(["--model", "m", "--settings", "defaults,fastest+allocator"])
    found = [one["who"] for one in measurements(args, "sft")]
    assert found == ["posttrain", "TRL defaults", "TRL fastest+allocator"]
    assert [environment for _, environment in calls] == [
        {"GLIBC_TUNABLES"},
        set(),
        {"GLIBC_TUNABLES"},
    ]
    assert [last for last, _ in calls[1:]] == ["defaults", "fastest"]


def test_settings_that_nobody_knows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["--model", "m", "--settings", "slowest"])
    assert "'slowest' is none of defaults, fastest, " in capsys.readouterr().err

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from flows.promotion import print_decision, split
from schemas.base import UserError

SCORES: dict[str, Any] = {
    "sha256": "0",
    "num_records": 4,
    "num_samples": 1,
    "pass_at": {"pass@1": 0.75},
    "reward": 1.25,
    "kl": 0.5,
    "length": 10.0,
    "truncated_fraction": 0.0,
    "components": {"proxy": 0.5},
}


@pytest.mark.parametrize(
    ("model", "version", "expected"),
    [
        ("m@champion", None, ("m", "champion")),
        ("m@3", None, ("m", "3")),
        ("m/3", None, ("m", "3")),
        ("m", "3", ("m", "3")),
        ("m", "@previous", ("m", "previous")),
    ],
)
def test_what_people_write(model: str, version: str | None, expected: tuple[str, str]) -> None:
    assert split(model, version) == expected


@pytest.mark.parametrize("model", ["m", "m@", "m/"])
def test_a_version_must_be_named(model: str) -> None:
    with pytest.raises(UserError, match="name a version of m"):
        split(model)


def test_every_check_and_number_is_shown() -> None:
    found = {
        "registered_model": "m",
        "version": "2",
        "aliases": ["challenger"],
        "outcome": "refused by ada",
        "approval": {"granted": False, "by": "ada", "when": "today", "reason": "[no]"},
        "rolled_back": None,
        "checks": [
            {
                "rule": "limits[length].max",
                "passed": False,
                "observed": 10.0,
                "required": 9.0,
                "reason": "length 10.000, above the limit of 9",
                "numbers": {"incumbent": 8.5},
            },
            {
                "rule": "slices[num_terms=6]",
                "passed": True,
                "observed": None,
                "required": 20.0,
                "reason": "not judged",
                "numbers": {},
            },
        ],
        **{model: SCORES for model in ("candidate", "baseline", "incumbent")},
    }
    console = Console(width=150, record=True, file=io.StringIO())
    print_decision(console, found)
    lines = console.export_text().splitlines()
    assert lines[0] == "m version 2 @challenger: refused by ada"
    assert lines[1] == "refused by ada at today: [no]"
    (limit,) = (line.split() for line in lines if line.startswith("limits"))
    assert limit[:4] == ["limits[length].max", "FAIL", "10.0000", "9.0000"]
    assert any(line.strip() == "incumbent 8.5" for line in lines)
    (small,) = (line.split() for line in lines if line.startswith("slices"))
    assert small == ["slices[num_terms=6]", "pass", "20.0000", "not", "judged"]
    assert [line.split() for line in lines[-6:]] == [
        [name, *[f"{value:.4f}"] * 3]
        for name, value in (
            ("pass@1", 0.75),
            ("reward", 1.25),
            ("kl", 0.5),
            ("length", 10.0),
            ("truncated_fraction", 0.0),
            ("proxy", 0.5),
        )
    ]

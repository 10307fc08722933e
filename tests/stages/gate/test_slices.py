from __future__ import annotations

from typing import Any

import pytest

from schemas.base import UserError
from schemas.evaluation import SliceConfig
from stages.gate.slices import find_slices


def records(*metadata: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": f"r{index}", "metadata": one} for index, one in enumerate(metadata)]


def config(field: str = "level", **changes: Any) -> SliceConfig:
    fields = {"field": field, "min_records": 1, "max_regression": 0.0, **changes}
    return SliceConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["easy", "hard", "easy"], {"easy": ["r0", "r2"], "hard": ["r1"]}),
        ([4, 5, 4.0], {"4": ["r0", "r2"], "5": ["r1"]}),
        ([True, False, True], {"true": ["r0", "r2"], "false": ["r1"]}),
    ],
)
def test_every_value_is_a_slice(values: list[Any], labels: dict[str, list[str]]) -> None:
    (found,) = find_slices(records(*({"level": value} for value in values)), [config()])
    assert found == labels


def test_values_that_are_named_are_the_only_ones() -> None:
    rows = records(*({"level": value} for value in (1, 2, 3)))
    assert find_slices(rows, [config(values=[3, "1"])]) == [{"1": ["r0"], "3": ["r2"]}]


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        (
            [{"level": 1}, {}, {}],
            {},
            "gate.slices.0.field level: 2 of the 3 records of data.evaluation have no such field, "
            "for example r1; columns of the source beside prompt and answer become such fields",
        ),
        ([{"levels": 1}], {}, "for example r0; did you mean levels?"),
        ([{"a": 1, "b": 2}], {}, "fields there: a, b"),
        ([{"level": None}], {}, "1 of the 1 records"),
        ([{"level": [1]}], {}, "record r0 has the value [1]; a slice is named by a text, a whole"),
        ([{"level": 1.5}], {}, "record r0 has the value 1.5"),
        (
            [{"level": 1}, {"level": 1}, {"level": 2}],
            {"min_records": 2, "values": [1, 2, 3]},
            "gate.slices.0: fewer than 2 records of data.evaluation have level 2, 3; there are "
            "1 (2), 2 (1): add records, lower gate.slices.0.min_records, or name other values",
        ),
        ([{"level": 1}], {"min_records": 2}, "fewer than 2 records"),
    ],
)
def test_what_the_data_lack_is_one_message(
    metadata: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        find_slices(records(*metadata), [config(**changes)])
    assert message in str(error.value)


def test_every_field_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        find_slices([{"id": "r0"}], [config("a"), config("b")])
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "gate.slices.0.field a",
        "gate.slices.1.field b",
    ]

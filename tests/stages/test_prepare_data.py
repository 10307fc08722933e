"""Reading, checking and separating the splits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.store import Store
from schemas.artifacts import DatasetArtifact
from schemas.base import UserError
from schemas.data import DataSource
from schemas.fingerprint import fingerprint
from schemas.records import LAYOUT_FIELDS, digest_position, prompt_digest, record_prompt
from schemas.requests import PrepareDataRequest, Runtime
from schemas.rewards import VerifierConfig
from stages import prepare_data
from stages.data.raw import RawRecord
from stages.data.records import iter_records, read_records
from stages.data.sources import source_digests
from stages.rewards.verifiers import build_verifier

REAL = Path(__file__).parents[3] / "shared" / "data"
LAYOUTS: dict[str, Any] = {
    "demonstrations": "prompt_completion",
    "preferences": "preference",
    "preferences_held_out": "preference",
    "step_labels": "steps",
    "step_labels_held_out": "steps",
    "prompts": "verifiable",
    "evaluation": "verifiable",
}


class Silent:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.update(metrics)

    def rewind(self, step: int) -> None:
        raise AssertionError("data preparation has no checkpoints")


def prepare(
    folder: Path,
    split: Any,
    source: dict[str, Any],
    *,
    layout: Any = None,
    root: Path | None = None,
    **inputs: Any,
) -> DatasetArtifact:
    """Run the stage and publish what it made, as the flow does."""
    store = Store(folder / "store")
    data = DataSource.model_validate(source)
    request = PrepareDataRequest(
        runtime=Runtime(store=str(store.root), data_root=str(root or folder)),
        split=split,
        sources=source_digests(data, root or folder),
        layout=layout or LAYOUTS[split],
        source=data,
        **inputs,
    )
    request = request.model_copy(update={"fingerprint": fingerprint(request)})
    run_dir = store.work_dir(request.fingerprint)
    artifact = prepare_data.run(request, run_dir=run_dir, tracker=Silent())
    store.publish(request.fingerprint, artifact)
    return artifact


def records_of(folder: Path, artifact: DatasetArtifact) -> list[dict[str, Any]]:
    return read_records(Store(folder / "store").path(artifact))


def report_of(folder: Path, artifact: DatasetArtifact) -> dict[str, Any]:
    path = Store(folder / "store").path(artifact) / "report.json"
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def write_lines(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def refused(folder: Path, split: str, source: dict[str, Any], **inputs: Any) -> str:
    """The one message that a bad input gives."""
    with pytest.raises(UserError) as caught:
        prepare(folder, split, source, **inputs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def problem(index: int) -> dict[str, str]:
    return {"prompt": f"{index}+1=", "answer": str(index + 1)}


# What comes out.


def test_a_record_cannot_cause_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef verify(*_): return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("verifier", "function", "generator", "transform", "__class__", "__reduce__", "type")
    bait: dict[str, Any] = dict.fromkeys(names, "evil:verify")
    record = {"prompt": "evil:verify", "answer": "evil:verify", "metadata": bait, **bait}
    write_lines(tmp_path / "e.jsonl", record)
    artifact = prepare(tmp_path, "evaluation", {"path": "e.jsonl"})
    assert records_of(tmp_path, artifact)[0]["metadata"] == bait
    for function in ("math_verify", "stages.tasks.arithmetic:verify"):
        verifier = build_verifier(VerifierConfig(function=function))
        with contextlib.suppress(UserError):  # math-verify finds no mathematics there
            verifier.score(["evil:verify"], ["evil:verify"])
        verifier.close()
    assert not mark.exists()
    assert "evil" not in sys.modules


def test_records_come_out_in_order_with_ids(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": " 1+1=", "completion": "3"},
    ]
    write_lines(tmp_path / "a.jsonl", *rows)
    artifact = prepare(tmp_path, "demonstrations", {"path": "a.jsonl"})
    records = records_of(tmp_path, artifact)
    first = hashlib.sha256(b"1+1=").hexdigest()[:16]
    second = hashlib.sha256(b"2+2=").hexdigest()[:16]
    assert [record.pop("id") for record in records] == [first, second, f"{first}-2"]
    assert records == rows
    assert (artifact.num_records, artifact.num_prompts) == (3, 2)
    assert (artifact.split, artifact.layout) == ("demonstrations", "prompt_completion")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"answer": "ü", "prompt": f"{i}?", "extra": {"b": 1, "a": [2.5, None]}} for i in "ab"]
    shas = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "a.jsonl", *rows)
        artifact = prepare(tmp_path / name, "prompts", {"path": "a.jsonl"})
        shas.append((artifact.sha256, artifact.fingerprint))
    assert shas[0] == shas[1]


def test_training_data_keep_their_duplicates_and_count_them(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", *[problem(i % 2) for i in range(5)])
    artifact = prepare(tmp_path, "prompts", {"path": "a.jsonl"})
    ids = [record["id"] for record in records_of(tmp_path, artifact)]
    assert len(set(ids)) == 5
    assert artifact.metrics == {"num_read": 5.0, "num_kept": 5.0, "num_duplicates": 3.0}


def test_held_out_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", *[{**problem(i % 2), "source": i} for i in range(5)])
    artifact = prepare(tmp_path, "evaluation", {"path": "a.jsonl"})
    assert [r["metadata"] for r in records_of(tmp_path, artifact)] == [{"source": 0}, {"source": 1}]
    report = report_of(tmp_path, artifact)
    assert (report["read"], report["kept"], report["duplicates"]) == (5, 2, 3)
    assert artifact.metrics == {"num_read": 5.0, "num_kept": 2.0, "num_duplicates": 3.0}


def test_further_fields_are_metadata_of_verifiable_records(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {**problem(1), "level": 3, "metadata": {"kind": "sum"}})
    artifact = prepare(tmp_path, "prompts", {"path": "a.jsonl"})
    assert records_of(tmp_path, artifact)[0]["metadata"] == {"level": 3, "kind": "sum"}


def test_further_fields_of_other_layouts_are_left_out_and_reported(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"prompt": "1", "completion": "2", "url": "x"})
    artifact = prepare(tmp_path, "demonstrations", {"path": "a.jsonl"})
    assert records_of(tmp_path, artifact)[0].keys() == {"id", "prompt", "completion"}
    assert report_of(tmp_path, artifact)["ignored_fields"] == ["url"]


def test_conversations_are_taken(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    write_lines(tmp_path / "a.jsonl", {"messages": turns})
    artifact = prepare(tmp_path, "demonstrations", {"path": "a.jsonl"}, layout="messages")
    (record,) = records_of(tmp_path, artifact)
    assert record == {"id": hashlib.sha256(b"hi").hexdigest()[:16], "messages": turns}


# Kinds of sources.


def test_blank_lines_byte_order_marks_and_line_ends_of_windows(tmp_path: Path) -> None:
    line = json.dumps(problem(1)).encode()
    separator = '{"prompt": "a\u2028b", "answer": "1"}'.encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + separator)
    artifact = prepare(tmp_path, "prompts", {"path": "a.jsonl"})
    assert [r["prompt"] for r in records_of(tmp_path, artifact)] == ["1+1=", "a\u2028b"]


@pytest.mark.parametrize("as_array", [True, False])
def test_a_json_file_may_be_an_array_or_lines(tmp_path: Path, as_array: bool) -> None:
    rows = [problem(1), problem(2)]
    text = json.dumps(rows, indent=2) if as_array else "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text(text)
    artifact = prepare(tmp_path, "prompts", {"path": "a.json"})
    assert artifact.num_records == 2


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "q", "name": None}]
    rows = [{"prompt": turns, "completions": ["a", "b"], "labels": [True, False]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    artifact = prepare(tmp_path, "step_labels", {"path": "a.parquet"})
    (record,) = records_of(tmp_path, artifact)
    assert record["prompt"] == [{"role": "user", "content": "q"}]
    assert record["labels"] == [True, False]


def test_parquet_faults_name_the_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist([problem(1), {"prompt": "2+1=", "answer": None}])
    pq.write_table(table, tmp_path / "a.parquet")
    message = refused(tmp_path, "prompts", {"path": "a.parquet"})
    assert message == "a.parquet row 2: field answer: must be text, not null"


def test_a_generator(tmp_path: Path) -> None:
    source = {
        "generator": "stages.tasks.arithmetic:problems",
        "arguments": {"count": 20, "seed": 1, "digest_range": [0.8, 1.0]},
    }
    artifact = prepare(tmp_path, "evaluation", source)
    assert (artifact.num_records, artifact.num_prompts) == (20, 20)
    for record in iter_records(Store(tmp_path / "store").path(artifact)):
        assert digest_position(prompt_digest(record["prompt"])) >= 0.8


def test_columns_then_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_transform.py").write_text(
        "def split(record, *, sign):\n"
        "    for part in record['both'].split('|'):\n"
        "        yield {'prompt': part + sign, 'answer': record['answer']}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    write_lines(tmp_path / "a.jsonl", {"text": "1+1|2+0", "answer": "wrong", "value": "2"})
    source = {
        "path": "a.jsonl",
        "columns": {"both": "text", "answer": "value"},
        "transform": "my_transform:split",
        "arguments": {"sign": "="},
    }
    records = records_of(tmp_path, prepare(tmp_path, "prompts", source))
    assert [(r["prompt"], r["answer"]) for r in records] == [("1+1=", "2"), ("2+0=", "2")]


# Shares of a source.


def test_disjoint_digest_ranges_share_a_source(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", *map(problem, range(200)))
    held_out = prepare(tmp_path, "evaluation", {"path": "a.jsonl", "digest_range": [0.8, 1.0]})
    training = prepare(
        tmp_path, "prompts", {"path": "a.jsonl", "digest_range": [0.0, 0.8]}, evaluation=held_out
    )
    assert held_out.num_records + training.num_records == 200
    assert 20 <= held_out.num_records <= 60
    report = report_of(tmp_path, training)
    assert report["outside_digest_range"] == held_out.num_records
    for record in records_of(tmp_path, training):
        assert digest_position(prompt_digest(record_prompt(record))) < 0.8


def test_the_limit_counts_kept_records_and_stops_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.py").write_text(
        "import itertools\n"
        "def rows():\n"
        "    return ({'prompt': f'{i // 2}', 'answer': 'x'} for i in itertools.count())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    artifact = prepare(tmp_path, "evaluation", {"generator": "endless:rows", "limit": 3})
    assert [r["prompt"] for r in records_of(tmp_path, artifact)] == ["0", "1", "2"]
    report = report_of(tmp_path, artifact)
    assert report["limit_reached"] is True
    assert (report["read"], report["duplicates"]) == (5, 2)


# What is refused.

GOOD = b'{"prompt": "1+1=", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a.jsonl: the file is empty; it needs at least one record"),
        (b"\n \n", "data.prompts: the source holds no records; check it"),
        (GOOD + b'{"prompt": "1+1=",\n', "a.jsonl line 2: not valid JSON: "),
        (GOOD + b"{} {}\n", "a.jsonl line 2: not valid JSON: Extra data at column 4"),
        (GOOD + b'{"prompt": "\xff"}\n', "a.jsonl line 2: byte 13 (0xff) is not UTF-8; save"),
        ('{"prompt": "ä"}'.encode("utf-16"), "a.jsonl line 1: byte 1 (0xff) is not UTF-8"),
        (GOOD + b"[1]\n", "a.jsonl line 2: an array, not an object; write one JSON object"),
        (GOOD + b'"x"\n', "a.jsonl line 2: a string, not an object"),
        (GOOD + b"null\n", "a.jsonl line 2: null, not an object"),
        (GOOD + b"1.5\n", "a.jsonl line 2: a number, not an object"),
        (b'{"prompt": NaN}', "a.jsonl line 1: not valid JSON: NaN is not a JSON value"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl line 1: not valid JSON: "),
        (b"[" * 100_000, "a.jsonl line 1: the JSON is nested too deeply"),
        (
            b'{"prompt": "1", "answer": "1", "deep": ' + b"[" * 400 + b"]" * 400 + b"}",
            "nested more than 50 levels deep",
        ),
        (b"{}", "a.jsonl line 1: no field prompt: it has no fields; data.prompts expects prompt"),
        (
            b'{"question": "1", "answer": "2"}',
            "no field prompt: it has question, answer; data.prompts expects prompt, answer: "
            "rename fields with columns, or make records with a transform",
        ),
        (
            b'{"prompt": "1", "chosen": "2", "rejected": "3"}',
            "a.jsonl line 1: no field answer: this looks like preference: it has fields prompt, "
            "chosen, rejected; data.prompts expects prompt, answer",
        ),
        (b'{"prompt": "1", "answer": 2}', "line 1: field answer: must be text, not a number"),
        (b'{"prompt": "1", "answer": " "}', "a.jsonl line 1: field answer: is empty"),
        (b'{"prompt": 7, "answer": "2"}', "field prompt: must be text or a list of messages"),
        (b'{"prompt": [], "answer": "2"}', "field prompt: has 0 entries; it needs 1"),
        (b'{"prompt": ["a"], "answer": "2"}', "field prompt[0]: must be a message with role"),
        (b'{"prompt": [{}], "answer": "2"}', "field prompt[0].role: is missing"),
        (
            b'{"prompt": [{"role": "human", "content": "x"}], "answer": "2"}',
            "field prompt[0].role: is 'human'; it must be 'system', 'user', 'assistant' or 'tool'",
        ),
        (
            b'{"prompt": [{"role": "user", "content": "x", "tool_calls": []}], "answer": "2"}',
            "field prompt[0].tool_calls: is not supported; a message has role and content only",
        ),
        (
            b'{"prompt": [{"role": "assistant", "content": "x"}], "answer": "2"}',
            "field prompt: needs a user message",
        ),
        (b'{"prompt": "\\ud800", "answer": "2"}', "field prompt: is not valid Unicode text"),
        (b'{"prompt": "1", "answer": "2", "x": "\\ud800"}', "field metadata: 'x' is not valid"),
        (
            b'{"prompt": "1", "answer": "2", "x": 1e999}',
            "field metadata: 'x' is inf, which JSON does not hold",
        ),
        (b'{"prompt": "1", "answer": "2", "metadata": 3}', "line 1: metadata must be an object"),
        (b'{"prompt": 1, "answer": 2}', "(and 1 more fault in this record)"),
    ],
)
def test_a_bad_file_is_named_by_line_and_field(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert expected in refused(tmp_path, "prompts", {"path": "a.jsonl"})


@pytest.mark.parametrize(
    ("split", "record", "expected"),
    [
        (
            "demonstrations",
            {"prompt": "1", "chosen": "2", "rejected": "3"},
            "this looks like preference: it has fields prompt, chosen, rejected; "
            "data.demonstrations expects prompt, completion",
        ),
        ("demonstrations", {"messages": []}, "this looks like messages"),
        (
            "demonstrations",
            {"prompt": "1", "completion": [{"role": "assistant", "content": "2"}]},
            "prompt is text, completion is a list of messages; within a record all must be",
        ),
        ("preferences", {"prompt": "1", "chosen": "2", "rejected": "2"}, "are the same"),
        (
            "step_labels",
            {"prompt": "1", "completions": ["a", "b"], "labels": [True]},
            "a.jsonl line 1: labels has 1 entries and completions 2; each step needs one label",
        ),
        (
            "step_labels",
            {"prompt": "1", "completions": ["a", "b"], "labels": [True, "no"]},
            "a.jsonl line 1: field labels[1]: must be true or false, not 'no'",
        ),
        (
            "step_labels",
            {"prompt": "1", "completions": "a", "labels": [True]},
            "field completions: must be a list, not text",
        ),
        (
            "step_labels",
            {"prompt": "1", "completions": ["a", ""], "labels": [True, False]},
            "field completions[1]: is empty",
        ),
    ],
)
def test_a_bad_record_is_named(
    tmp_path: Path, split: str, record: dict[str, Any], expected: str
) -> None:
    write_lines(tmp_path / "a.jsonl", record)
    assert expected in refused(tmp_path, split, {"path": "a.jsonl"})


def test_a_bad_conversation_is_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_lines(tmp_path / "a.jsonl", {"messages": turns}, {"messages": turns[::-1]})
    message = refused(tmp_path, "demonstrations", {"path": "a.jsonl"}, layout="messages")
    assert message.startswith("a.jsonl line 2: field messages: ends with a message of the user")


def test_a_bad_array_item_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([problem(1), 3]))
    assert refused(tmp_path, "prompts", {"path": "a.json"}).startswith("a.json item 2: a number")
    (tmp_path / "b.json").write_text('[\n{"prompt": "1",\n]')
    assert refused(tmp_path, "prompts", {"path": "b.json"}).startswith("b.json line 3: not valid")
    (tmp_path / "c.json").write_bytes(b'[\n"\xfe"]')
    assert "c.json line 2: byte 2 (0xfe)" in refused(tmp_path, "prompts", {"path": "c.json"})


def test_unreadable_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    expected = {
        "no.jsonl": "no.jsonl: no such file",
        "folder.jsonl": "folder.jsonl: not a file",
        "a.csv": "a.csv: unknown kind of file .csv; records are read from .jsonl, .json, .parquet",
        "a.parquet": "a.parquet: not a readable Parquet file",
    }
    for path, text in expected.items():
        assert text in refused(tmp_path, "prompts", {"path": path})


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", problem(1))
    message = refused(tmp_path, "prompts", {"path": "a.jsonl", "columns": {"prompt": "question"}})
    assert message == (
        "a.jsonl line 1: no field question, which columns reads prompt from; it has prompt, answer"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"count": 3}, "missing a required argument: 'seed'; its arguments are: count, seed"),
        ({"count": 3, "seed": 0, "terms": 2}, "unexpected keyword argument 'terms'"),
        ({"count": -1, "seed": 0}, "count=-1 must not be negative"),
        ({"count": "3", "seed": 0}, "TypeError"),
    ],
)
def test_wrong_generator_arguments(
    tmp_path: Path, arguments: dict[str, Any], expected: str
) -> None:
    path = "stages.tasks.arithmetic:problems"
    message = refused(tmp_path, "evaluation", {"generator": path, "arguments": arguments})
    assert message.startswith(path)
    assert expected in message


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 3", "my_faulty:make returned a int; it must yield records, or return a list"),
        ("return {}", "my_faulty:make returned a dict"),
        ("return ['x']", "a.jsonl line 1, record 1 of my_faulty:make: a str, not a record"),
        ("return [record['no']]", "a.jsonl line 1: my_faulty:make failed: there is no field 'no'"),
        ("raise ValueError('one\\ntwo')", "my_faulty:make failed: ValueError: one"),
        ("return [1 / 0]", "a.jsonl line 1: my_faulty:make failed: ZeroDivisionError: division"),
        ("return [{}]", "a.jsonl line 1, record 1 of my_faulty:make: no field prompt"),
        ("return []", "the source holds no records; check it, and its transform"),
    ],
)
def test_faulty_transforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, expected: str
) -> None:
    (tmp_path / "my_faulty.py").write_text(f"def make(record):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_faulty", raising=False)
    write_lines(tmp_path / "a.jsonl", problem(1))
    source = {"path": "a.jsonl", "transform": "my_faulty:make"}
    assert expected in refused(tmp_path, "prompts", source)


def test_unknown_functions(tmp_path: Path) -> None:
    message = refused(tmp_path, "prompts", {"generator": "stages.tasks.arithmetic:problem"})
    assert "problem" in message
    assert "no_such_module" in refused(tmp_path, "prompts", {"generator": "no_such_module:f"})


def test_an_empty_digest_range(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", problem(1))
    position = digest_position(prompt_digest(problem(1)["prompt"]))
    low, high = (0.0, position) if position > 0.5 else (position + 1e-9, 1.0)
    message = refused(tmp_path, "prompts", {"path": "a.jsonl", "digest_range": [low, high]})
    assert "none of the 1 records has a prompt in digest_range" in message
    assert "widen it" in message


READ_HUB = (
    "import sys\n"
    "from pathlib import Path\n"
    "from schemas.base import UserError\n"
    "from schemas.data import DataSource\n"
    "from stages.data.readers import read_raw\n"
    "try:\n"
    "    for raw in read_raw(DataSource(hub=sys.argv[1]), Path('.')):\n"
    "        print(raw.place.rsplit('/')[-1], raw.value)\n"
    "except UserError as error:\n"
    "    print(error)\n"
)


def read_hub(folder: Path, name: str) -> list[str]:
    """Read a hub data set offline; in a process of its own, since the switch is read on import."""
    pytest.importorskip("datasets")
    done = subprocess.run(
        [sys.executable, "-c", READ_HUB, name],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PATH": ""},
    )
    return done.stdout.splitlines()


def test_the_hub_out_of_reach(tmp_path: Path) -> None:
    (message,) = read_hub(tmp_path, "nobody/nothing")
    assert message.startswith("hub data set nobody/nothing, split train: cannot be loaded")
    assert "download it and name the file with path" in message


def test_a_hub_data_set(tmp_path: Path) -> None:
    """A folder in the hub's layout stands for one."""
    (tmp_path / "rows").mkdir()
    write_lines(tmp_path / "rows" / "train.jsonl", problem(1), problem(2))
    lines = read_hub(tmp_path, str(tmp_path / "rows"))
    assert lines == [f"rows train row {n} {problem(n)}" for n in (1, 2)]


# Splits that must not touch.


def test_contamination_by_the_evaluation_is_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "held.jsonl", *map(problem, range(10)))
    turns = [{"role": "user", "content": "3+1= "}]
    said = [{"role": "assistant", "content": "4"}]
    rows = [{"prompt": f"{i}+1=", "completion": str(i)} for i in (1, 2, 20, 30)]
    conversation = {"prompt": turns, "completion": said}
    write_lines(tmp_path / "train.jsonl", *rows, conversation, {**rows[0], "completion": "x"})
    evaluation = prepare(tmp_path, "evaluation", {"path": "held.jsonl"})
    message = refused(tmp_path, "demonstrations", {"path": "train.jsonl"}, evaluation=evaluation)
    assert message.startswith(
        "3 of the 5 prompts of data.demonstrations are also among the 10 prompts of "
        "data.evaluation, for example train.jsonl line 1: '1+1='"
    )
    assert "digest_range" in message


def test_contamination_of_a_held_out_split_by_training(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    write_lines(tmp_path / "train.jsonl", *pairs[:2])
    write_lines(tmp_path / "other.jsonl", pairs[2])
    write_lines(tmp_path / "held.jsonl", *pairs[2:])
    first = prepare(tmp_path, "preferences", {"path": "train.jsonl"})
    second = prepare(tmp_path, "preferences", {"path": "other.jsonl"})
    source = {"path": "held.jsonl"}
    prepare(tmp_path, "preferences_held_out", source, training=(first,))
    message = refused(tmp_path, "preferences_held_out", source, training=(first, second))
    assert message.startswith(
        "1 of the 2 prompts of data.preferences_held_out are also among the 1"
    )


# Digests of sources.


def test_source_digests_follow_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_source.py").write_text("def make(record):\n    yield record\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    write_lines(tmp_path / "a.jsonl", problem(1))
    source = DataSource(path="a.jsonl", transform="my_source:make")
    before = source_digests(source, tmp_path)
    content = (tmp_path / "a.jsonl").read_bytes()
    assert before["path"] == hashlib.sha256(content).hexdigest()
    write_lines(tmp_path / "a.jsonl", problem(2))
    after = source_digests(source, tmp_path)
    assert before["path"] != after["path"]
    assert before["transform"] == after["transform"]
    generated = source_digests(DataSource(generator="stages.tasks.arithmetic:problems"), tmp_path)
    assert generated.keys() == {"generator"}
    assert source_digests(DataSource(hub="a/b"), tmp_path) == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "no.jsonl"}, "no.jsonl: no such file"),
        ({"generator": "stages.tasks.arithmetic:nothing"}, "nothing"),
        ({"path": "a.jsonl", "transform": "no_such_module:f"}, "no_such_module"),
    ],
)
def test_source_digests_refuse_what_is_missing(
    tmp_path: Path, source: dict[str, Any], expected: str
) -> None:
    write_lines(tmp_path / "a.jsonl", problem(1))
    with pytest.raises(UserError, match=expected):
        source_digests(DataSource.model_validate(source), tmp_path)


def test_heavy_packages_are_not_imported() -> None:
    script = (
        "import sys, stages.prepare_data, stages.data.sources\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'prefect', 'mlflow'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


# Any bytes at all.

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "prompt", "x", "\n", "\ud800"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "bot"]),
            "content": st.sampled_from(["", "a", "\u00e9", "e\u0301"]) | JSON_VALUES,
        }
    ),
    max_size=3,
)
FIELDS = ("messages", "prompt", "completion", "chosen", "rejected", "completions", "labels")
RECORDS = st.dictionaries(
    st.sampled_from([*FIELDS, "answer", "metadata", "other", "\n", "\ud800"]),
    st.text(max_size=3) | MESSAGES | st.lists(st.booleans() | st.text(max_size=2)) | JSON_VALUES,
)
FILES = st.binary(max_size=200) | st.lists(
    RECORDS.map(lambda record: json.dumps(record).encode()) | st.binary(max_size=20), max_size=4
).map(b"\n".join)


@given(content=FILES, layout=st.sampled_from(list(LAYOUT_FIELDS)), name=st.sampled_from("lj"))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_give_records_or_one_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, layout: Any, name: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = {"l": "a.jsonl", "j": "a.json"}[name]
    (folder / path).write_bytes(content)
    try:
        artifact = prepare(folder, "prompts", {"path": path}, layout=layout)
    except UserError as error:
        message = str(error)
    else:
        check_sound(folder, artifact)
        return
    assert message.startswith((path, "data.prompts: "))
    assert message.isprintable()


def check_sound(folder: Path, artifact: DatasetArtifact) -> None:
    records = records_of(folder, artifact)
    assert len(records) == artifact.num_records > 0
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        json.dumps(record, allow_nan=False)


# The real data sets.

real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not here")


@real
def test_gsm8k(tmp_path: Path) -> None:
    functions = "stages.data.gsm8k:"
    training = prepare(
        tmp_path,
        "demonstrations",
        {"path": "gsm8k/train.jsonl", "transform": functions + "to_demonstration"},
        root=REAL,
    )
    assert training.num_records == 7473
    for record in records_of(tmp_path, training):
        text = record["completion"][0]["content"]
        assert "<<" not in text
        steps, last = text.rsplit("\n", 1)
        assert steps
        assert float(last.removeprefix("#### ")) is not None
    evaluation = prepare(
        tmp_path,
        "evaluation",
        {"path": "gsm8k/test.jsonl", "transform": functions + "to_verifiable"},
        root=REAL,
    )
    assert evaluation.num_records == 1319
    assert all(float(r["answer"]) is not None for r in records_of(tmp_path, evaluation))
    tails = {
        r["prompt"][0]["content"].rsplit("\n\n", 1)[1] for r in records_of(tmp_path, evaluation)
    }
    assert len(tails) == 1


@real
def test_gsm8k_pairs_are_of_test_questions(tmp_path: Path) -> None:
    source = {
        "path": "gsm8k/example_model_solutions.jsonl",
        "transform": "stages.data.gsm8k:to_preferences",
    }
    pairs = prepare(tmp_path, "preferences", source, root=REAL)
    assert (pairs.num_records, pairs.num_prompts) == (2429, 731)
    for record in records_of(tmp_path, pairs):
        assert "\n#### " in record["chosen"][0]["content"]
        assert "<<" not in record["rejected"][0]["content"]
    evaluation = prepare(
        tmp_path,
        "evaluation",
        {"path": "gsm8k/test.jsonl", "transform": "stages.data.gsm8k:to_verifiable"},
        root=REAL,
    )
    message = refused(tmp_path, "preferences", source, root=REAL, evaluation=evaluation)
    assert message.startswith("731 of the 731 prompts")


@real
@pytest.mark.parametrize(
    ("name", "right"),
    [("logical_deduction", 6), ("multistep_arithmetic", 62), ("word_sorting", 34)],
)
def test_bigbench_mistake(tmp_path: Path, name: str, right: int) -> None:
    path = f"bigbench_mistake/{name}.jsonl"
    source = {"path": path, "transform": "stages.data.bigbench_mistake:to_steps"}
    artifact = prepare(tmp_path, "step_labels", source, root=REAL)
    records = records_of(tmp_path, artifact)
    raw = [json.loads(line) for line in (REAL / path).read_text().splitlines()]
    assert len(records) == 300
    assert sum(all(record["labels"]) for record in records) == right
    for record, row in zip(records, raw, strict=True):
        mistake = row["mistake_index"]
        assert record["labels"] == sorted(record["labels"], reverse=True)
        assert len(record["labels"]) == len(row["steps"])
        if mistake is not None:
            assert record["labels"].index(False) == mistake


def test_gsm8k_transforms_by_hand() -> None:
    from stages.data.gsm8k import INSTRUCTION, to_demonstration, to_preferences, to_verifiable

    raw = {"question": " How many? ", "answer": "She has 2*600 = <<2*600=1200>>1,200.\n#### 1,200"}
    prompt = [{"role": "user", "content": f"How many?\n\n{INSTRUCTION}"}]
    (demonstration,) = to_demonstration(raw)
    said = [{"role": "assistant", "content": "She has 2*600 = 1,200.\n#### 1200"}]
    assert demonstration == {"prompt": prompt, "completion": said}
    assert list(to_verifiable(raw)) == [{"prompt": prompt, "answer": "1200"}]
    solutions = {
        "question": "How many?",
        "ground_truth": "2\nA: 2",
        "one": {"is_correct": True, "solution": "1+1 = <<1+1=2>>2\nA: 2"},
        "two": {"is_correct": False, "solution": "1+1 = <<1+1=3>>3\nA: 3"},
        "three": {"is_correct": False, "solution": "so it is\n1+1 = <<1+1"},
    }
    pairs = [
        (p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in to_preferences(solutions)
    ]
    assert pairs == [("1+1 = 2\n#### 2", "1+1 = 3\n#### 3"), ("1+1 = 2\n#### 2", "so it is\n1+1 =")]
    with pytest.raises(ValueError, match="no line ####"):
        list(to_verifiable({"question": "?", "answer": "2"}))


def test_bigbench_mistake_by_hand() -> None:
    from stages.data.bigbench_mistake import to_steps

    raw = {"input": "1 + 1 =", "steps": ["a", "b\nb", "c"], "mistake_index": 1}
    (record,) = to_steps(raw, instruction="Add.")
    assert record == {
        "prompt": [{"role": "user", "content": "1 + 1 =\n\nAdd."}],
        "completions": ["a", "b b", "c"],
        "labels": [True, False, False],
    }
    assert next(to_steps({**raw, "mistake_index": None}))["labels"] == [True, True, True]
    with pytest.raises(ValueError, match="mistake_index is 3, but there are 3 steps"):
        next(to_steps({**raw, "mistake_index": 3}))


def test_a_message_about_a_long_name_of_a_field_stays_short() -> None:
    assert RawRecord("a", {"x" * 100_000: 1, "b": 2}).names() == f"{'x' * 80}…, b"
    assert RawRecord("a", {str(n): n for n in range(50)}).names().endswith("38, 39, and 10 more")

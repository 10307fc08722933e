from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from infra import code
from infra.code import (
    changed_code,
    created_by,
    load_function,
    loaded_code,
    source_digest,
)
from infra.files import file_digest
from schemas.base import UserError

PLAIN = """
def verify(text, answer):
    return float(text == answer)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def digest_of(folder: Path, text: str, name: str = "mine") -> str:
    (folder / f"{name}.py").write_text(text)
    return source_digest(f"{name}:verify")


def test_comments_docstrings_and_layout_do_not_count(folder: Path) -> None:
    commented = '''"""A module."""
# why
def verify(text, answer):
    """Says so."""

    return float(
        text == answer  # equal
    )
'''
    assert digest_of(folder, PLAIN) == digest_of(folder, commented)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace("==", "!="),
        PLAIN.replace("answer", "gold"),
        PLAIN + "LIMIT = 3\n",
        PLAIN.replace("def", "async def"),
        PLAIN.replace("return", "'not a docstring, but the second'; 'x'; return"),
    ],
)
def test_every_change_of_the_code_counts(folder: Path, text: str) -> None:
    assert digest_of(folder, PLAIN) != digest_of(folder, text)


def test_constants_of_different_types_differ(folder: Path) -> None:
    texts = [f"verify = {value}\n" for value in ("1", "1.0", "True", "'1'", "b'1'", "None", "...")]
    assert len({digest_of(folder, text) for text in texts}) == len(texts)


def test_a_digest_stays_the_same_from_release_to_release(folder: Path) -> None:
    # It enters fingerprints: if this fails, every finished stage would be run again.
    assert digest_of(folder, PLAIN)[:16] == "6fb38ec2d4dba130"


def test_a_module_is_read_without_running_it_or_its_package(folder: Path) -> None:
    (folder / "dangerous").mkdir()
    (folder / "dangerous" / "__init__.py").write_text("raise SystemExit('ran')\n")
    (folder / "dangerous" / "inner.py").write_text(PLAIN + "raise SystemExit('ran')\n")
    assert len(source_digest("dangerous.inner:verify")) == 64
    assert "dangerous" not in sys.modules


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mine", "write module:function"),
        ("mine:", "write module:function"),
        (":verify", "write module:function"),
        ("mine:a.b", "write module:function"),
        ("nowhere_at_all:verify", "no Python module nowhere_at_all; run posttrain in the folder"),
        ("mnie:verify", "no Python module mnie; did you mean mine"),
        ("mine:verfy", r"mine\.py defines no verfy; did you mean verify"),
        ("mine.inner:verify", r"no Python module mine\.inner"),
        ("stages.task.arithmetic:verify", r"no Python module stages\.task"),
        ("math:sqrt", "no Python module math"),
    ],
)
def test_wrong_paths_say_what_to_do(folder: Path, path: str, message: str) -> None:
    (folder / "mine.py").write_text(PLAIN)
    with pytest.raises(UserError, match=message):
        source_digest(path)


def test_source_that_does_not_parse_is_the_users(folder: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.py does not parse"):
        digest_of(folder, "def verify(:\n")


@pytest.mark.parametrize(
    "text",
    [
        "from math import sqrt as verify\n",
        "verify = len\n",
        "if True:\n    def verify(): ...\n",
        "try:\n    import fast as verify\nexcept ImportError:\n    verify = None\n",
        "verify: int = 3\n",
        "first, verify = 1, 2\n",
    ],
)
def test_every_way_to_define_a_name_is_seen(folder: Path, text: str) -> None:
    assert len(digest_of(folder, text)) == 64


def test_a_local_name_is_not_a_function_of_the_module(folder: Path) -> None:
    with pytest.raises(UserError, match="defines no verify"):
        digest_of(folder, "def other():\n    verify = 1\n")


def test_load_function(folder: Path) -> None:
    (folder / "loaded_one.py").write_text(PLAIN + "LIMIT = 3\n")
    assert load_function("loaded_one:verify")("a", "a") == 1.0
    with pytest.raises(UserError, match="LIMIT is a int, not a function"):
        load_function("loaded_one:LIMIT")
    with pytest.raises(UserError, match="defines no verfy; did you mean verify"):
        load_function("loaded_one:verfy")


def test_a_module_that_raises_is_the_users(folder: Path) -> None:
    (folder / "broken_one.py").write_text(PLAIN + "1 / 0\n")
    with pytest.raises(UserError, match="importing broken_one raised ZeroDivisionError"):
        load_function("broken_one:verify")


@pytest.mark.parametrize(
    "path",
    [
        "os:system",  # not os's own, but star-imported into it
        "builtins:eval",
        "posix:system",
        "mine:__class__",
        "mine:__builtins__",
        "mine.__init__:verify",
        "__main__:verify",
        "../mine:verify",
        "/tmp/mine:verify",
        "mine.:verify",
        ".mine:verify",
        "mine:verify.__globals__",
        "mine:verify:verify",
        "mine\0:verify",
        "mine :verify",
        ":",
        "",
        "os.path;import evil:verify",
    ],
)
def test_a_path_that_names_no_function_of_the_user_is_refused_before_any_import(
    folder: Path, path: str
) -> None:
    (folder / "mine.py").write_text(PLAIN)
    before = set(sys.modules)
    for read in (source_digest, load_function):
        with pytest.raises(UserError) as caught:
            read(path)
        assert len(str(caught.value).splitlines()) == 1
    assert "mine" not in set(sys.modules) - before


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "a") == known


def test_only_our_modules_are_recorded() -> None:
    digests = loaded_code()
    assert {"infra.code", "infra", "schemas.base"} <= digests.keys()
    assert {name.split(".")[0] for name in digests} <= {"flows", "stages", "schemas", "infra"}
    assert changed_code(digests) == []


def test_a_module_run_by_name_is_recorded_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", code)
    assert "__main__" not in loaded_code()
    assert "infra.code" in loaded_code()


class Importing:
    """Garbage that, collected, adds a module: what a finalizer or another thread may do."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.itself = self

    def __del__(self) -> None:
        self.names.append(f"imported_meanwhile_{len(self.names)}")
        sys.modules[self.names[-1]] = ModuleType(self.names[-1])


def test_an_import_in_the_middle_of_it_does_no_harm() -> None:
    names: list[str] = []
    threshold = gc.get_threshold()
    # There are more modules than 100; old objects are left alone, which takes seconds.
    gc.set_threshold(100, 10**6, 10**6)
    try:
        for _ in range(2):
            gc.collect()  # takes the store of old tuples away: the next ones are counted
            Importing(names)
            loaded_code()
    finally:
        gc.set_threshold(*threshold)
        for name in names:
            del sys.modules[name]
    assert names


def test_changed_and_removed_files_are_named() -> None:
    recorded = {"infra.code": "0" * 64, "infra": "0" * 64, "stages.gone.module": "0" * 64}
    assert changed_code(recorded) == ["infra/__init__.py", "infra/code.py", "stages/gone/module.py"]


@pytest.mark.parametrize("name", ["", ".", "stages..core", "stages/core", "sys"])
def test_a_record_of_what_is_no_module_of_ours_is_one_of_other_code(name: str) -> None:
    assert len(changed_code({name: "0" * 64})) == 1


def test_an_edit_is_seen_in_the_same_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_OURS", ("mine",))
    (folder / "mine.py").write_text(PLAIN)
    load_function("mine:verify")
    recorded = loaded_code()
    assert list(recorded) == ["mine"]
    (folder / "mine.py").write_text("# a comment\n" + PLAIN)
    os.utime(folder / "mine.py", (1, 1))
    assert changed_code(recorded) == []
    (folder / "mine.py").write_text(PLAIN.replace("==", "!="))
    os.utime(folder / "mine.py", (2, 2))
    assert changed_code(recorded) == ["mine.py"]
    del sys.modules["mine"]


@pytest.mark.parametrize("name", ["compiled.c", "another.c", "shared.h"])
def test_the_c_files_of_a_module_are_part_of_it(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "_OURS", ("compiled",))
    (folder / "compiled.py").write_text(PLAIN)
    for file in ("compiled.c", "another.c", "shared.h"):
        (folder / file).write_text("int one(void) { return 1; }")
    load_function("compiled:verify")
    recorded = loaded_code()
    assert changed_code(recorded) == []
    (folder / name).write_text("int one(void) { return 2; }")
    assert changed_code(recorded) == ["compiled.py"]
    del sys.modules["compiled"]


def test_created_by_names_what_decides_the_numbers() -> None:
    record = created_by()
    assert record.packages["torch"].startswith("2.")
    assert record.python.startswith("3.")
    assert record.code == loaded_code()

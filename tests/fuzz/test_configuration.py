"""Recipes, `--set`, import paths and the command line."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.cli import app
from flows.recipes import SHIPPED, apply_override, load_recipe
from infra.code import load_function, source_digest
from infra.redaction import redact
from schemas.base import UserError
from schemas.pipeline import PipelineConfig

sys.path.insert(0, str(Path(__file__).parent))  # the strategies beside this file
from strategies import JSON, TEXT, WORDS, broken, changed, dump, files, paths

FUZZ = settings.get_profile("fuzz")
RECIPES = [path.read_bytes() for path in sorted(SHIPPED.glob("*.yaml"))]
CONTENT: dict[str, Any] = yaml.safe_load((SHIPPED / "quickstart.yaml").read_text())
PLACES = [".".join(map(str, place)) for place in paths(CONTENT) if place]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def load(path: Path, content: bytes, overrides: list[str] | None = None) -> PipelineConfig:
    path.write_bytes(content)
    config = load_recipe(str(path), overrides)
    # What is accepted can be written down and read again.
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
    return config


@FUZZ
@given(content=files(RECIPES[:1]))
def test_any_file(folder: Path, judge: Any, content: bytes) -> None:
    judge("recipe: any bytes", load, folder / "a.yaml", content)


@FUZZ
@given(content=st.one_of(*map(broken, RECIPES)))
def test_shipped_recipes_with_wrong_bytes(folder: Path, judge: Any, content: bytes) -> None:
    judge("recipe: broken bytes", load, folder / "b.yaml", content)


@FUZZ
@given(content=changed(CONTENT).map(dump))
def test_shipped_recipes_with_wrong_values(folder: Path, judge: Any, content: bytes) -> None:
    judge("recipe: wrong values", load, folder / "c.yaml", content)


SETS = st.one_of(
    TEXT,
    st.tuples(st.one_of(st.sampled_from(PLACES), TEXT), st.one_of(TEXT, WORDS)).map("=".join),
    st.tuples(st.sampled_from(PLACES), JSON.map(lambda value: dump(value).decode())).map("=".join),
    st.tuples(st.sampled_from(PLACES), st.sampled_from([".0", ".x", "..", ".9"]), WORDS).map(
        lambda parts: f"{parts[0]}{parts[1]}={parts[2]}"
    ),
    st.tuples(st.sampled_from(PLACES), st.sampled_from([50, 5_000, 100_000])).map(
        lambda parts: f"{parts[0]}={'[' * parts[1]}"
    ),
)


@FUZZ
@given(override=SETS)
def test_overrides(judge: Any, override: str) -> None:
    judge("--set", load_recipe, "quickstart", [override])
    judge("--set: raw", apply_override, copy.deepcopy(CONTENT), override)


@FUZZ
@given(path=st.one_of(TEXT, WORDS, st.tuples(TEXT, TEXT).map(":".join)))
def test_import_paths(judge: Any, path: str) -> None:
    before = set(sys.modules)
    judge("import path", source_digest, path)
    judge("import path", load_function, path)
    ours = ("stages", "infra", "schemas", "flows")
    new = {name for name in set(sys.modules) - before if not name.startswith(ours)}
    assert not new, new


@FUZZ
@given(text=st.one_of(TEXT, WORDS, st.lists(st.one_of(TEXT, WORDS)).map("://".join)))
def test_redaction(judge: Any, text: str) -> None:
    once = judge("redaction", redact, text)
    assert redact(once) == once


@pytest.fixture
def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever relative paths are drawn, and no Prefect server anywhere."""
    (folder / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(folder / "here")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


WORDS_OF_COMMANDS = st.one_of(
    st.sampled_from(
        [
            *("--set", "--home", "--dry-run", "--explain", "--json", "--rollout", "--keep-days"),
            *("--cron", "--work-pool", "--timezone", "--name", "--pause", "--resume", "--help"),
            *("quickstart", "latest", "-1", "0", "99999999999999999999", "0 2 * * *", "--", "-"),
            *("seed=1", "seed=x", "rl.algorithm=dpo", "--reason"),
        ]
    ),
    TEXT,
    WORDS,
)
COMMANDS = st.sampled_from(["run", "show", "credit", "runs", "gc", "deploy", "serve", "rollback"])


@FUZZ
@given(command=st.one_of(COMMANDS, TEXT), words=st.lists(WORDS_OF_COMMANDS, max_size=5))
def test_command_line(
    folder: Path, judge: Any, elsewhere: None, command: str, words: list[str]
) -> None:
    # Nothing may begin to work: a run that is well put is planned, a rollback lacks its reason.
    more = {"run": ["--dry-run"], "gc": ["--dry-run"]}.get(command, [])
    words = [word for word in words if command != "rollback" or word != "--reason"]

    def invoke() -> int:
        result = CliRunner().invoke(app, [command, *more, *words, "--home", str(folder / "home")])
        error = result.exception
        assert error is None or isinstance(error, SystemExit), repr(error)
        assert result.exit_code in (0, 2), result.output
        assert "Traceback" not in result.output
        if result.exit_code == 2:
            raise UserError(result.output)
        return result.exit_code

    environment = dict(os.environ)
    try:
        judge("command line", invoke)
    finally:
        os.environ.clear()
        os.environ.update(environment)

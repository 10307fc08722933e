"""Who may import whom: the house rules of the four packages, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("flows", "stages", "schemas", "infra")
STAGES_MAY_USE = {
    "infra.code",
    "infra.devices",
    "infra.files",
    "infra.heartbeat",
    "infra.launch",
    "infra.memory",
    "infra.redaction",
    "infra.store",
    "infra.tracking",
}


def modules() -> list[Path]:
    return sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module


def names(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check() -> None:
    assert len(modules()) > 60


@pytest.mark.parametrize("path", modules(), ids=identifier)
def test_imports_keep_to_the_house(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    used = names(path)
    ours = used & set(OURS)
    if parts[0] == "schemas":
        assert ours <= {"schemas"}
        assert not used & {"torch", "transformers", "prefect", "mlflow"}
    if parts[0] == "infra":
        assert ours <= {"schemas", "infra"}
    if parts[:2] == ("stages", "core"):
        assert ours <= {"stages"}
        assert all(
            name.startswith("stages.core") for name in imports(path) if name.startswith("stages")
        )
        assert not used & {"transformers", "numpy", "pydantic"}
    elif parts[0] == "stages":
        assert ours <= {"schemas", "stages", "infra"}
        assert {name for name in imports(path) if name.startswith("infra")} <= STAGES_MAY_USE
    if parts[0] != "flows":
        assert "prefect" not in used
    if parts[0] != "infra":
        assert "mlflow" not in used
    if path.name != "vllm_engine.py":
        assert "vllm" not in used
    if path.name != "fused_head.py":
        assert "liger_kernel" not in path.read_text()


@pytest.mark.parametrize("path", modules(), ids=identifier)
def test_init_files_export_nothing(path: Path) -> None:
    if path.name == "__init__.py":
        assert path.read_text().strip() == ""


def test_nothing_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        top_level = ast.parse(path.read_text()).body
        graph[name] = {
            node.module
            for node in top_level
            if isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] in OURS
        }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())

"""Nothing in production code unpickles, evaluates text, or hands text to a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCTION = sorted(
    path for name in ("flows", "stages", "schemas", "infra") for path in (ROOT / name).rglob("*.py")
)
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "tarfile", "zipfile",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
YAML_LOADERS = {"_Loader"}
"""Ours, on yaml.SafeLoader."""
UNSAFE_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}
DECIDED = {"stages/models.py"}
"""Where `trust_remote_code` depends on the configuration's list."""


def dotted(node: ast.expr) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{dotted(node.value)}.{node.attr}"
        case _:
            return ""


def problems(source: str, name: str) -> Iterator[str]:
    """What is unsafe in a module, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            )
            for module in modules:
                if module and module.split(".")[0] in FORBIDDEN_MODULES:
                    yield f"{name}:{node.lineno}: imports {module}"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in FORBIDDEN_CALLS:
            yield f"{name}:{node.lineno}: {called}"
        if called in ("torch.load", "torch.hub.load", "torch.jit.load"):
            value = keywords.get("weights_only")
            if not (isinstance(value, ast.Constant) and value.value is True):
                yield f"{name}:{node.lineno}: {called} without weights_only=True"
        loader = dotted(keywords.get("Loader", ast.Constant(None)))
        if called in ("yaml.load", "yaml.load_all") and loader not in YAML_LOADERS:
            yield f"{name}:{node.lineno}: {called} without the safe loader"
        if called in ("yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle"):
            yield f"{name}:{node.lineno}: {called}"
        for keyword in UNSAFE_KEYWORDS & keywords.keys():
            value = keywords[keyword]
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield f"{name}:{node.lineno}: {keyword} is not False"
        closed = {"local_files_only", "trust_remote_code"} <= keywords.keys()
        if called.endswith(".from_pretrained") and name not in DECIDED and not closed:
            yield f"{name}:{node.lineno}: {called} may run code or reach for a hub"


@pytest.mark.parametrize("path", PRODUCTION, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_safe(path: Path) -> None:
    assert list(problems(path.read_text(), str(path.relative_to(ROOT)))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib, os",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "AutoModel.from_pretrained(x, local_files_only=True, trust_remote_code=True)",
        "AutoModel.from_pretrained(x)",
        "zipfile = 1\nimport zipfile",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert len(list(problems(line, "x.py"))) == 1


def test_the_safe_loader_is_one() -> None:
    import yaml

    from flows.recipes import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getcwd []", Loader=_Loader)

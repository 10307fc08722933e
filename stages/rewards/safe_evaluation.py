"""Keeps the libraries that score completions from running what a model wrote.

Some scorers of reasoning-gym call `eval` on a completion, and sympy's parser evaluates the Python
that it turns a text into, with `open` and `__import__` in reach. Here both take mathematics only.
"""

from __future__ import annotations

import ast
import operator
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}

# What sympy's parser makes of names and numbers: the only calls that may be given text.
_FROM_TEXT = {"Symbol", "Function", "Integer", "Float", "Rational"}
_TEXT = re.compile(r"\w+|\d*\.?\d*(?:[eE][-+]?\d+)?(?:/\d+)?", re.ASCII)
# Functions of sympy that are no classes.
_FUNCTIONS = {"sqrt", "cbrt", "root", "real_root", "gcd", "lcm", "abs", "max", "min"}
_MATHEMATICS = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Tuple,
    ast.List,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Constant,
    ast.expr_context,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)


def evaluate(text: str) -> Any:
    """The value of a Python literal or of arithmetic on literals; ValueError for anything else."""
    return _value(ast.parse(text.strip(), mode="eval").body)


def restrict() -> None:
    """Put this module between the scoring libraries, as far as they are imported, and `eval`."""
    import sympy.parsing.sympy_parser as parser

    for name, module in sys.modules.copy().items():
        if name.startswith("reasoning_gym."):
            module.__dict__["eval"] = evaluate
    if getattr(parser.stringify_expr, "__module__", None) == __name__:
        return
    to_python = parser.stringify_expr

    def stringify_expr(s: Any, local_dict: Any, global_dict: Any, transformations: Any) -> str:
        code: str = to_python(s, local_dict, global_dict, transformations)
        check_mathematics(code, {**global_dict, **local_dict})
        return code

    parser.stringify_expr = stringify_expr


def check_mathematics(code: str, names: Mapping[Any, Any]) -> None:
    """Raise ValueError unless code applies sympy's operators, functions and constants only."""
    tree = ast.parse(code.strip(), mode="eval")
    texts: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, _MATHEMATICS):
            raise ValueError(f"{type(node).__name__} is no mathematics")
        if isinstance(node, ast.Name):
            _check_name(node.id, names)
        elif isinstance(node, ast.Call):
            texts.update(_checked_texts(node))
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        if is_text and id(node) not in texts:
            raise ValueError(f"the text {ast.unparse(node)} is no mathematics")


def _check_name(name: str, names: Mapping[Any, Any]) -> None:
    from sympy import Basic

    value = names.get(name)
    known = isinstance(value, Basic) or (isinstance(value, type) and issubclass(value, Basic))
    if not known and name not in _FUNCTIONS:
        raise ValueError(f"{name} is no mathematics")


def _checked_texts(call: ast.Call) -> set[int]:
    """The texts among a call's arguments, where it may be given any and they are harmless."""
    if not isinstance(call.func, ast.Name) or call.func.id not in _FROM_TEXT:
        return set()
    return {
        id(node)
        for node in call.args
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and _TEXT.fullmatch(node.value)
    }


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.List():
            return [_value(item) for item in node.elts]
        case ast.Tuple():
            return tuple(_value(item) for item in node.elts)
        case ast.Set():
            return {_value(item) for item in node.elts}
        case ast.Dict() if None not in node.keys:
            keys = [_value(key) for key in node.keys if key is not None]
            return dict(zip(keys, map(_value, node.values), strict=True))
        case ast.UnaryOp() if type(node.op) in _UNARY:
            return _UNARY[type(node.op)](_value(node.operand))
        case ast.BinOp() if type(node.op) in _BINARY:
            return _BINARY[type(node.op)](_value(node.left), _value(node.right))
        case _:
            raise ValueError(f"{type(node).__name__} is neither a literal nor arithmetic")

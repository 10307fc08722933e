"""What the readers are fed with: any JSON, any text, and good documents made bad."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

# Lone surrogates, NUL, byte order marks and line separators among them.
CHARACTERS = st.one_of(
    st.characters(exclude_categories=()),
    st.sampled_from("\0\ufeff\u2028\x85\x1b\r\n\t\ud800'\"\\{}[]:,&*!|>%@`#-?= \u200b"),
)
TEXT = st.text(CHARACTERS, max_size=30)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, -(10**400)]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0]),
)
WORDS = st.sampled_from(
    [
        *("", " ", "null", "~", "true", "NaN", ".inf", "1e999", "0x10", "1_000", "1:30", "<<", "="),
        *("user", "assistant", "system", "tool", "auto", "native", "vllm", "grpo", "dpo", "ppo"),
        *("../..", "/etc/passwd", "C:\\x", "a\0b", "os:system", "builtins:eval", "__class__"),
        *("stages.tasks.arithmetic:problems", "math_verify", "org/name@main", "sha256:00"),
        *("http://a:b@c", "sqlite:////x", "2026-01-01", "!!python/object:os.system", "&a", "*a"),
    ]
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, WORDS)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(TEXT, WORDS), inner, max_size=4)
    ),
    max_leaves=12,
)
DEPTH = st.sampled_from([10, 60, 500, 3_000, 50_000])
DEEP = st.one_of(
    DEPTH.map(lambda depth: b"[" * depth + b"]" * depth),
    DEPTH.map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth),
    DEPTH.map(lambda depth: b"[" * depth),
)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\0", b""])


def dump(value: Any) -> bytes:
    """JSON as Python writes it: with NaN, infinities and escaped surrogates."""
    return json.dumps(value).encode()


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    found = [here]
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        found += paths(item, (*here, key))
    return found


@st.composite
def changed(draw: st.DrawFn, document: Any, most: int = 3) -> Any:
    """A document with places replaced, removed, added or renamed."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(paths(document)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(JSON)
            continue
        above = document
        for key in place[:-1]:
            above = above[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename"]))
        if action == "replace":
            above[place[-1]] = draw(JSON)
        elif action == "remove":
            del above[place[-1]]
        elif isinstance(above, dict):
            value = above.pop(place[-1]) if action == "rename" else draw(JSON)
            above[draw(st.one_of(TEXT, WORDS))] = value
    return document


@st.composite
def broken(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes with a few flipped, cut out, put in or repeated, or with the end missing."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "put", "repeat", "end"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 16))]
            case "put":
                piece = st.one_of(st.binary(max_size=8), TEXT.map(_encoded), DEEP)
                data[at:at] = draw(piece)
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case _:
                del data[at:]
    return bytes(data)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def files(good: list[bytes]) -> st.SearchStrategy[bytes]:
    """Whole files: anything at all, or good ones made bad."""
    lines = st.lists(
        st.tuples(
            st.one_of(JSON.map(dump), st.binary(max_size=40), DEEP, *map(st.just, good)), LINE_ENDS
        ),
        max_size=5,
    ).map(lambda rows: b"".join(line + end for line, end in rows))
    mark = st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b"])
    noise = st.tuples(mark, lines).map(b"".join)
    mutants = [broken(one) for one in good]
    return st.one_of(st.binary(max_size=80), noise, *mutants, *map(st.just, good))

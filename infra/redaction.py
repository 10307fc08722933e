"""Keeps secrets out of whatever this program writes: logs, records, tags, messages.

What is a secret: the value of an environment variable whose name says so, and the name and
password in an address. No library is used: those that exist guess secrets by their looks, and here
the values are known.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, TextIO, TypeVar
from urllib.parse import quote, quote_plus, unquote

_HIDDEN = "***"
_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|ACCESS_KEY(?:_ID)?|SECRET_KEY"
    r"|PRIVATE_KEY|ACCOUNT_KEY|AUTH_STRING|SAS)$",
    re.IGNORECASE,
)
_SHORTEST = 6
_SHORTEST_WORD = 16
"""Of a value of small letters only. Shorter ones are no secrets worth the name, and hiding `1` or
`postgres` would ruin every text; in an address they are hidden all the same."""

# A name and a password, which may hold a slash; a port is no password.
_USER_INFO = r"[^\s/'\"<>]*@|[^\s/:@'\"<>]*:(?!\d+(?:[/\s]|$))[^\s'\"<>]*@"
_URL = re.compile(rf"\b([a-zA-Z][a-zA-Z0-9+.-]*://)(?:{_USER_INFO})")
_PARAMETER = re.compile(
    r"([?&](?:[\w.-]*(?:token|password|passwd|secret|api_?key|signature)|sig)=)[^&\s'\"<>#]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9+/._~=-]{6,}", re.IGNORECASE)

_E = TypeVar("_E", bound=BaseException)


def redact(text: str) -> str:
    """The text with every secret replaced by `***`."""
    for pattern, shown in (
        (_URL, rf"\1{_HIDDEN}@"),
        (_PARAMETER, rf"\1{_HIDDEN}"),
        (_HEADER, rf"\1 {_HIDDEN}"),
    ):
        text = pattern.sub(shown, text)
    known = _pattern(tuple(sorted(set(_known_secrets(os.environ)))))
    return text if known is None else known.sub(_HIDDEN, text)


def redact_value(value: Any) -> Any:
    """JSON-like data with every text in it redacted, keys too; other values as they are."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_value(key): redact_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [redact_value(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def redact_error(error: _E) -> _E:
    """The same exception, with its message, its notes and its causes redacted in place."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = redact_value(one.args)
        if isinstance(one, OSError) and isinstance(one.strerror, str):
            one.strerror = redact(one.strerror)
        if hasattr(one, "__notes__"):
            one.__notes__ = redact_value(list(one.__notes__))
        pending += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            pending += one.exceptions
    return error


def secret_in(text: str) -> str | None:
    """What makes a text secret, for a message: a variable's name, or words; None if nothing."""
    for name, value in sorted(os.environ.items()):
        if _NAME.search(name) and _is_telling(value) and value in text:
            return f"the value of {name}"
    return "an address with a password, or a key" if redact(text) != text else None


def redact_process() -> None:
    """Redact what this process prints and logs from now on; call it first in a program."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _RedactedStream):
            setattr(sys, name, _RedactedStream(stream))
    factory = logging.getLogRecordFactory()
    if not getattr(factory, "redacts", False):
        logging.setLogRecordFactory(_RecordFactory(factory))


class _RecordFactory:
    """Makes log records that hold no secret, whichever handler takes them, and where."""

    redacts = True

    def __init__(self, factory: Any) -> None:
        self._factory = factory

    def __call__(self, *arguments: Any, **options: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._factory(*arguments, **options)
        try:
            message = record.getMessage()
        except Exception:  # the handler reports what is wrong with the call
            return record
        clean = redact(message)
        if clean != message:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None:
            # A formatter takes this text in place of formatting the exception itself.
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record


class _RedactedStream:
    """A text stream that redacts what is written, line by line where it can."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rest = ""

    def write(self, text: str) -> int:
        """Write whole lines; the rest waits for its end, so that no secret is cut in two."""
        whole, newline, rest = (self._rest + text).rpartition("\n")
        self._rest = rest
        if newline:
            self._stream.write(redact(whole + newline))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines, one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what waits, too."""
        rest, self._rest = self._rest, ""
        if rest:
            self._stream.write(redact(rest))
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _known_secrets(environment: Mapping[str, str]) -> Iterable[str]:
    """Every secret of an environment, in each form in which it may appear in a text."""
    for name, value in environment.items():
        found = [value] if _NAME.search(name) else []
        if "://" in value:
            found += _passwords(value)
        for secret in found:
            if _is_telling(secret):
                escaped = json.dumps(secret)[1:-1], repr(secret)[1:-1]
                yield from (secret, quote(secret, safe=""), quote_plus(secret), *escaped)


def _is_telling(secret: str) -> bool:
    word = secret.isalpha() and secret.islower()
    return len(secret) >= (_SHORTEST_WORD if word else _SHORTEST)


def _passwords(url: str) -> list[str]:
    password = re.search(r"://[^/:@]*:(.*)@", url)
    return [] if password is None else [password[1], unquote(password[1])]


@functools.lru_cache(maxsize=8)
def _pattern(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    if not secrets:
        return None
    longest_first = sorted(secrets, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))
